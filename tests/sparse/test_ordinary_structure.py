"""A masked model whose structure changes: adapters deleted or merged, layers replaced."""

import gc
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainingArguments

from fish_tuning import FishMask, FishTuningTrainer, apply_mask, get_mask, remove_mask
from tests.models import tiny_llama
from tests.sparse.twins import (
    CONFIGS,
    LAYERS,
    LORA,
    Twins,
    assert_close,
    base_model,
    config_of,
    copied,
    inputs,
    loss_of,
    output_of,
    random_bits,
    seeded,
)

IDS = inputs()
BIASED = "bias of all"
KINDS = [*CONFIGS, BIASED]


def config_for(kind):
    if kind == BIASED:
        return LoraConfig(target_modules=["lin0"], bias="all", **LORA)
    return config_of(kind)


def twins_of(kind):
    dense = seeded(lambda: get_peft_model(base_model("lora"), config_for(kind)), 1).double()
    bits = random_bits(dense, 1)
    twins = Twins(kind, apply_mask(copied(dense), bits), dense, bits)
    for model in twins.models():
        loss_of(model.eval(), IDS).backward()
    twins.step(lambda parameters: torch.optim.SGD(parameters, 0.1))
    return twins


def hooks_of(model):
    """Every hook on a module or a tensor, and every attribute and method set on an instance."""
    found = []
    for path, module in model.named_modules():
        found += [
            (path, kind, len(hooks))
            for kind, hooks in vars(module).items()
            if kind.endswith("_hooks") and hooks
        ]
        known = vars(nn.Module()).keys() | {"training"}
        found += [(path, "attribute", n) for n in vars(module) if "fish" in n and n not in known]
        found += [(path, "patch", n) for n, v in vars(module).items() if "partial" in repr(type(v))]
        found += [(path, "tensor", n) for n in vars(module).keys() & module._parameters.keys()]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    found += [(n, "tensor hook", 1) for n, t in tensors if t._post_accumulate_grad_hooks]
    return found


def facts_of(model):
    """What anybody can see of a model."""
    return {
        "parameters": [(n, p.shape, p.requires_grad) for n, p in model.named_parameters()],
        "buffers": [(n, b.shape) for n, b in model.named_buffers()],
        "modules": [(n, type(m)) for n, m in model.named_modules()],
        "state dict": list(model.state_dict()),
        "hooks": hooks_of(model),
    }


def assert_ordinary(model, plain):
    """It has what the plain model has and nothing else, and can be used in every way."""
    assert facts_of(model) == facts_of(plain)
    assert get_mask(model) is None
    for m in (model, plain):
        m.zero_grad()
        for p in m.parameters():
            p.requires_grad_(True)
        loss_of(m.eval(), IDS).backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            assert_close(ours.grad, theirs.grad, name)
    for make in (copied, lambda m: pickle.loads(pickle.dumps(m))):
        assert facts_of(make(model)) == facts_of(plain)
        assert torch.equal(output_of(make(model), IDS), output_of(model, IDS))
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state)
    assert all(not tensor.any() for tensor in model.state_dict().values())


@pytest.mark.parametrize("outer", ["kept", "dropped"])
@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_after_unloading(kind, how, outer):
    """Guards against hooks, buffers and errors that a merged model keeps for good."""
    twins = twins_of(kind)
    ours, plain = (getattr(model, how)() for model in twins.models())
    if outer == "dropped":
        del twins
        gc.collect()
    with torch.no_grad():
        assert_close(output_of(ours, IDS), output_of(plain, IDS), "output")
    assert_ordinary(ours, plain)


def test_the_model_below_can_be_adapted_and_masked_again():
    """Guards against a second round that trains the values of the first, or none."""
    ours, plain = (model.unload() for model in twins_of("lora").models())
    again = [seeded(lambda m=m: get_peft_model(m, config_of("ia3")), 3) for m in (ours, plain)]
    bits = random_bits(again[1].double(), 3)
    twins = Twins("ia3", apply_mask(again[0].double(), bits), again[1], bits)
    for model in twins.models():
        loss_of(model, IDS).backward()
    twins.step(lambda parameters: torch.optim.SGD(parameters, 0.1))
    twins.assert_same_state()


@pytest.mark.parametrize("before", ["trained", "after a forward pass with gradients"])
@pytest.mark.parametrize("kind", KINDS)
def test_deleting_the_masked_adapter(kind, before):
    """Guards against values of a deleted adapter that are trained, counted and saved."""
    twins = twins_of(kind)
    for model in twins.models():
        if before != "trained":
            loss_of(model, IDS)
        if kind != BIASED:
            seeded(lambda m=model: m.add_adapter("other", config_of(kind)), 2)
            model.double().set_adapter("other")
        model.delete_adapter("default")
    if kind == BIASED:
        # The biases are the base model's own, and stay what is trained.
        assert {n for n in get_mask(twins.masked)} == {n for n in twins.bits if "lora" not in n}
        return
    assert_ordinary(twins.masked, twins.dense)


def test_an_adapter_of_the_same_name_again():
    """Guards against a new adapter that is half of the old one."""
    twins = twins_of("lora")
    for model in twins.models():
        model.delete_adapter("default")
        seeded(lambda m=model: m.add_adapter("default", config_of("lora")), 4)
        model.double().set_adapter("default")
    assert_ordinary(twins.masked, twins.dense)


def test_saving_after_deleting(tmp_path):
    """Guards against a file that describes an adapter that is gone."""
    twins = twins_of("lora")
    for model in twins.models():
        seeded(lambda m=model: m.add_adapter("other", config_of("lora")), 2)
        model.delete_adapter("default")
    twins.masked.save_pretrained(tmp_path / "masked")
    twins.dense.save_pretrained(tmp_path / "dense")
    files = [
        sorted(str(f.relative_to(tmp_path / kind)) for f in (tmp_path / kind).rglob("*"))
        for kind in ("masked", "dense")
    ]
    assert files[0] == files[1]


def test_remove_mask_with_another_adapter_active():
    """Guards against an inactive adapter that becomes trainable with its mask gone."""
    twins = twins_of("lora")
    for model in twins.models():
        seeded(lambda m=model: m.add_adapter("other", config_of("lora")), 2)
        model.double().set_adapter("other")
    remove_mask(twins.masked)
    assert facts_of(twins.masked) == facts_of(twins.dense)
    for model in twins.models():
        model.set_adapter("default")
    assert facts_of(twins.masked) == facts_of(twins.dense)


# The inner model, without the outer one


@pytest.mark.parametrize("outer", ["kept", "dropped"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_inner_model_alone(kind, outer):
    """Guards against an inner model that cannot be trained, copied or pickled."""
    twins = twins_of(kind)
    ours, plain = (model.get_base_model() for model in twins.models())
    bits = {name.removeprefix("base_model.model."): b for name, b in twins.bits.items()}
    if outer == "dropped":
        del twins
        gc.collect()
    for make in (copied, lambda m: pickle.loads(pickle.dumps(m))):
        clone = make(ours)
        # A pickle has the outer model as well, which is garbage then.
        gc.collect()
        assert_close(output_of(clone, IDS), output_of(plain, IDS), "copy")
        assert_ordinary(clone, make(plain))
    if outer == "dropped":
        assert_ordinary(ours, plain)
        return
    inner = Twins(kind, ours, plain, bits)
    for model in inner.models():
        loss_of(model, IDS).backward()
    inner.assert_same_gradients()
    inner.step(lambda parameters: torch.optim.SGD(parameters, 0.1))
    twins.assert_same_state()
    inner.assert_same_output(IDS)


# A mask that no longer fits


def own_weights():
    model = tiny_llama(tie_word_embeddings=False)
    for name, p in model.named_parameters():
        p.requires_grad_("embed_tokens" in name or "q_proj" in name)
    return apply_mask(model, random_bits(model, 2))


def resized():
    model = own_weights()
    model.resize_token_embeddings(44)
    return model, "embed_tokens"


def with_another_head():
    model = twins_of("modules_to_save").masked
    head = model.base_model.model.head
    head.modules_to_save["default"] = nn.Linear(8, 3).double()
    return model, "head"


def with_another_layer():
    model = twins_of("lora").masked
    model.base_model.model.lin1 = nn.Linear(8, 8).double()
    return model, "lin1"


def without_a_layer():
    model = tiny_llama()
    for name, p in model.named_parameters():
        p.requires_grad_("q_proj" in name)
    apply_mask(model, random_bits(model, 2))
    model.model.layers = model.model.layers[:1]
    return model, r"layers\.1"


CHANGES = [resized, with_another_head, with_another_layer, without_a_layer]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
@pytest.mark.parametrize(
    "use",
    [
        lambda model, folder: output_of(model, IDS),
        lambda model, folder: model.save_pretrained(folder),
    ],
    ids=["forward", "save"],
)
def test_a_mask_that_no_longer_fits_is_noticed(change, use, tmp_path):
    """Guards against training, and files, of entries that nobody chose."""
    model, changed = change()
    if not hasattr(model, "save_pretrained"):
        pytest.skip("a model without files")
    with pytest.raises(RuntimeError, match=rf"no longer fits the model.*{changed}.*remove_mask"):
        use(model, tmp_path)


@pytest.mark.parametrize("change", [resized, without_a_layer], ids=lambda c: c.__name__)
def test_a_mask_that_no_longer_fits_is_noticed_when_training_starts(change, tmp_path):
    """Guards against a Trainer that trains whatever is there."""
    model, changed = change()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
    )
    data = [{"input_ids": row, "labels": row} for row in IDS]
    with pytest.raises(RuntimeError, match=rf"no longer fits the model.*{changed}"):
        FishTuningTrainer(model=model, args=arguments, train_dataset=data).train()


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_masking_what_the_model_has_become(change):
    """Guards against an error whose advice does not help."""
    model, _ = change()
    remove_mask(model)
    assert get_mask(model) is None
    loss_of(model, IDS).backward()
    bits = random_bits(model, 5)
    apply_mask(model, bits)
    assert get_mask(model) == FishMask(bits)
    loss_of(model, IDS).backward()


# What a masked model looks like


@pytest.mark.parametrize("masked", [False, True])
def test_a_sequential_keeps_its_elements(masked):
    """Guards against a root that has one more element, or another last one."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    if masked:
        apply_mask(model, random_bits(model, 2))
    assert len(model) == 3
    assert isinstance(model[-1], nn.Linear)
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [type(m) for m in model.children()] == [nn.Linear, nn.ReLU, nn.Linear]
    assert len(nn.Sequential(*model.children(), nn.ReLU())) == 4
    model.append(nn.ReLU())
    model(torch.ones(2, 4)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_no_module_and_no_key_of_a_dictionary_is_added(kind):
    """Guards against whoever goes through modules, children or the adapters' names."""
    ours, plain = (model for model in twins_of(kind).models())
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in plain.named_modules()]
    for module, other in zip(ours.modules(), plain.modules(), strict=True):
        assert type(module) is type(other)
        if isinstance(other, nn.ParameterDict):
            assert list(module.keys()) == list(other.keys())
            assert len(module) == len(other)
            assert [n for n, _ in module.items()] == [n for n, _ in other.items()]
            assert list(vars(module)["_keys"]) == list(vars(other)["_keys"])
    assert LAYERS[0] in dict(ours.get_base_model().named_children())
