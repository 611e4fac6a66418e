"""Trained numbers are found where people look for them: by name, by module, by shape."""

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_layer_status,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer, TrainingArguments

from fish_tuning import apply_mask, get_mask
from tests.models import tiny_bert, tiny_llama, with_lora
from tests.sparse.twins import (
    CONFIGS,
    KINDS,
    LORA,
    OWN,
    TWO,
    Twins,
    base_model,
    copied,
    inputs,
    loss_of,
    owner_of,
    random_bits,
    seeded,
    tensor_of,
    values_of,
)


def twins_of(config):
    dense = seeded(lambda: get_peft_model(base_model("lora"), config), 1).double()
    bits = random_bits(dense, 1)
    return Twins("lora", apply_mask(copied(dense), bits), dense, bits)


def five_steps(twins, optimizers):
    """Weight decay moves frozen entries of the twin: those are put back."""
    twins.optimizers = optimizers
    for i in range(5):
        twins.backward(i)
        twins.step(None)
        twins.assert_same_state()


# LoRA+


LORA_PLUS = {
    "lora": lambda: LoraConfig(target_modules=["lin0", "lin1"], **LORA),
    "dora": lambda: LoraConfig(target_modules=["lin0"], use_dora=True, **LORA),
    "embedding": lambda: LoraConfig(target_modules=["embedding", "lin0"], **LORA),
    "head": lambda: LoraConfig(target_modules=["lin0"], modules_to_save=["head"], **LORA),
    "biases": lambda: LoraConfig(target_modules=["lin0"], bias="all", **LORA),
}


@pytest.mark.parametrize("kind", LORA_PLUS)
def test_lora_plus(kind):
    """Guards against A and B with one rate: PEFT's own optimizer goes by names and dimensions."""
    twins = twins_of(LORA_PLUS[kind]())
    settings = {"lr": 1e-2, "loraplus_lr_ratio": 16, "loraplus_weight_decay": 0.1}
    settings["loraplus_lr_embedding"] = 1e-1
    optimizers = [
        create_loraplus_optimizer(model, torch.optim.AdamW, **settings) for model in twins.models()
    ]
    groups = [
        [
            {names[id(p)] for p in group["params"]} & twins.trainable(model)
            for group in optimizer.param_groups
        ]
        for model, optimizer in zip(twins.models(), optimizers, strict=True)
        for names in [{id(p): n for n, p in model.named_parameters()}]
    ]
    assert groups[0] == groups[1]
    five_steps(twins, optimizers)


# Groups of one's own, by name


def by_side(name):
    return "A" if "lora_A" in name else "B" if "lora_B" in name else "rest"


def by_layer(name):
    return next((layer for layer in ("lin0", "lin1", "head") if layer in name), "rest")


def by_end(name):
    return "no decay" if name.endswith("bias") else "decay"


@pytest.mark.parametrize("rule", [by_side, by_layer, by_end], ids=lambda r: r.__name__)
@pytest.mark.parametrize("kind", ["lora", "dora", "modules_to_save", OWN])
def test_rates_and_decay_by_name(kind, rule):
    """Guards against groups that are empty, so that these tensors are not trained at all."""
    twins = Twins.build(kind)
    keys = sorted({rule(name) for name in twins.bits})
    optimizers = []
    for model in twins.models():
        groups = {}
        for name, p in model.named_parameters():
            if p.requires_grad:
                groups.setdefault(rule(name), []).append(p)
        optimizers.append(
            torch.optim.AdamW(
                [
                    {
                        "params": parameters,
                        "lr": 1e-2 / (1 + keys.index(key)),
                        "weight_decay": 0.1 * keys.index(key),
                    }
                    for key, parameters in groups.items()
                ]
            )
        )
    five_steps(twins, optimizers)


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama], ids=lambda b: b.__name__)
@pytest.mark.parametrize("adapter", [False, True], ids=["own weights", "lora"])
def test_weight_decay_of_a_trainer(build, adapter, tmp_path):
    """Guards against biases and norms that a Trainer decays only once they are masked."""
    plain = with_lora(build(), init_lora_weights=False) if adapter else build()
    masked = copied(plain)
    apply_mask(masked, random_bits(masked, 2))
    groups = []
    for model in (masked, plain):
        arguments = TrainingArguments(
            str(tmp_path), weight_decay=0.1, report_to="none", use_cpu=True
        )
        optimizer = Trainer(model=model, args=arguments).create_optimizer()
        names = {id(p): n for n, p in model.named_parameters()}
        groups.append(
            {
                names[id(p)]: group["weight_decay"]
                for group in optimizer.param_groups
                for p in group["params"]
            }
        )
    unselected = {name for name, bits in get_mask(masked).items() if not bits.any()}
    assert groups[0] == {n: decay for n, decay in groups[1].items() if n not in unselected}
    assert set(groups[0].values()) == ({0.1} if adapter and build is tiny_llama else {0.1, 0.0})


@pytest.mark.parametrize("kind", KINDS)
def test_values_have_the_names_of_their_tensors(kind):
    """Guards against trained numbers that nobody finds who goes by names."""
    twins = Twins.build(kind)
    for name in twins.partly():
        owner, attribute = owner_of(twins.masked, name)
        values = owner._parameters[attribute]
        tensor = tensor_of(twins.masked, name)
        assert values.numel() == int(twins.bits[name].sum())
        assert values.shape == ((values.numel(),) if tensor.dim() == 1 else (values.numel(), 1))
        assert tensor.shape == twins.bits[name].shape
        assert attribute not in owner._buffers
    shapes = {name: p.shape for name, p in twins.masked.named_parameters()}
    dense = {name: p.shape for name, p in twins.dense.named_parameters()}
    assert {n for n, shape in shapes.items() if shape != dense[n]} == set(twins.partly())


# Freezing


def by_name(part):
    def freeze(model):
        for name, p in model.named_parameters():
            if part in name:
                p.requires_grad = False

    return freeze


def by_module(model):
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.lora_A.requires_grad_(False)


def for_quantised_training(model):
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


FREEZE = {
    "lora_A by name": by_name("lora_A"),
    "a layer by name": by_name("lin1"),
    "lora_A by module": by_module,
    "all": lambda model: model.requires_grad_(False),
    "inference_mode": lambda model: model.set_adapter("default", inference_mode=True),
    "set_requires_grad": lambda model: model.set_requires_grad("default", requires_grad=False),
    "kbit training": for_quantised_training,
}


@pytest.mark.parametrize("how", FREEZE)
@pytest.mark.parametrize("kind", CONFIGS)
def test_frozen_numbers_are_not_trained(kind, how):
    """Guards against PEFT's and people's ways of freezing that do not reach the values."""
    twins = Twins.build(kind)
    for model in twins.models():
        FREEZE[how](model)
    trained = twins.trainable(twins.dense)
    assert twins.trainable(twins.masked) == trained
    if not trained:
        with pytest.raises(RuntimeError, match="does not require grad"):
            loss_of(twins.masked, inputs()).backward()
        return
    for model in twins.models():
        loss_of(model, inputs()).backward()
    twins.step(lambda parameters: torch.optim.SGD(parameters, 0.1))
    twins.assert_same_state()


@pytest.mark.parametrize("kind", CONFIGS)
def test_frozen_and_trained_again(kind):
    """Guards against an adapter that stays frozen, or wakes up by itself."""
    twins = Twins.build(kind)
    for flag in (False, True):
        for model in twins.models():
            model.set_requires_grad("default", requires_grad=flag)
        assert twins.trainable(twins.masked) == twins.trainable(twins.dense)
    for model in twins.models():
        loss_of(model, inputs()).backward()
    twins.step(lambda parameters: torch.optim.SGD(parameters, 0.1))
    twins.assert_same_state()


def test_enabling_and_disabling_layers():
    """Guards PEFT's switches of all adapters, which freeze by module."""
    twins = Twins.build(TWO)
    for model in twins.models():
        model.base_model.disable_adapter_layers()
    assert twins.trainable(twins.masked) == twins.trainable(twins.dense) == set()
    twins.assert_same_output(inputs())
    for model in twins.models():
        model.base_model.enable_adapter_layers()
    assert twins.trainable(twins.masked) == twins.trainable(twins.dense) != set()


# Reports


@pytest.mark.parametrize("kind", [*CONFIGS, TWO])
def test_peft_reports_the_same_status(kind):
    """Guards against adapters that PEFT's own reports do not find, or find irregular."""
    twins = Twins.build(kind)
    # A tensor without a selected entry is not trained, which makes its layer irregular.
    masked, dense = Twins.build(kind, seed=2), twins.dense
    ours, plain = masked.masked.get_layer_status(), dense.get_layer_status()
    for layer, other in zip(ours, plain, strict=True):
        assert layer.name == other.name
        assert layer.requires_grad == other.requires_grad
        assert layer.available_adapters == other.available_adapters
        assert layer.active_adapters == other.active_adapters
    status, expected = masked.masked.get_model_status(), dense.get_model_status()
    assert status.requires_grad == expected.requires_grad
    assert status.available_adapters == expected.available_adapters
    active = {n: b for n, b in masked.bits.items() if n in masked.trainable(masked.dense)}
    assert status.trainable_params == sum(int(b.sum()) for b in active.values())


@pytest.mark.parametrize("kind", CONFIGS)
def test_counts_of_peft_are_those_of_the_mask(kind, capsys):
    """Guards against counters that see the dense tensors, or the tensors twice."""
    twins = Twins.build(kind)
    assert isinstance(twins.masked, PeftModel)
    trainable, total = twins.masked.get_nb_trainable_parameters()
    dense_trainable, dense_total = twins.dense.get_nb_trainable_parameters()
    assert trainable == get_mask(twins.masked).num_trainable
    assert total == dense_total - dense_trainable + trainable
    twins.masked.print_trainable_parameters()
    assert f"trainable params: {trainable:,} ||" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["lora", "ia3"])
@pytest.mark.parametrize("where", ["parameters", "tensors"])
def test_status_after_freezing_directly(kind, where):
    """Guards against a status, or a graph, of what was trained before."""
    twins = Twins.build(kind)
    names = [name for name in twins.partly() if "lin0" in name]
    for trained in (False, True):
        for model in twins.models():
            for name in names:
                masked = model is twins.masked and where == "parameters"
                of = values_of if masked else tensor_of
                of(model, name).requires_grad_(trained)
        for status in (get_layer_status, lambda model: model.get_layer_status()):
            ours, dense = (status(model) for model in twins.models())
            assert [s.requires_grad for s in ours] == [s.requires_grad for s in dense]
        twins.backward()
        twins.assert_same_gradients()
        twins.masked.zero_grad()
        twins.dense.zero_grad()
