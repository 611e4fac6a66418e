"""Adapters of a masked model: masks of their own, switching, freezing, deleting, unloading."""

import copy
import gc
import pickle

import pytest
import torch
from peft import IA3Config, LoKrConfig, LoraConfig, PeftModel, convert_to_lora, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from torch.utils.checkpoint import checkpoint

from fish_tuning import FishMask, apply_mask, get_mask, remove_mask
from fish_tuning.sparse import is_masked, masked_parameters
from tests.sparse.small import (
    LORA,
    Mlp,
    adapter_tensors,
    add_adapter,
    assert_close,
    inputs,
    lora_mlp,
    random_mask,
    train,
)


def two_adapters():
    """A model with two adapters, each with a mask of its own; the first is active."""
    model = lora_mlp()
    add_adapter(model, "other", 1)
    first, second = random_mask(model), random_mask(model, "other", 1)
    apply_mask(model, first)
    model.set_adapter("other")
    apply_mask(model, second)
    model.set_adapter("default")
    return model, first, second


def alone(adapter):
    """A dense model with one of these adapters, and its mask."""
    model = lora_mlp()
    add_adapter(model, "other", 1)
    mask = random_mask(model, adapter, int(adapter == "other"))
    model.set_adapter(adapter)
    return model, mask


def trained_alone(adapter, steps=3):
    model, mask = alone(adapter)
    train(model, mask, steps)
    return adapter_tensors(model, adapter)


def test_two_masks_in_one_model(tmp_path):
    """Guards against adapters that train each other's values, in turn, saved, loaded, merged."""
    model, first, second = two_adapters()
    assert get_mask(model, "default") == FishMask(first)
    assert get_mask(model, "other") == FishMask(second)
    assert get_mask(model) == FishMask(first | second)
    train(model)
    model.set_adapter("other")
    train(model)
    assert_close(adapter_tensors(model), trained_alone("default"))
    assert_close(adapter_tensors(model, "other"), trained_alone("other"))
    model.save_pretrained(tmp_path)
    assert FishMask.from_pretrained(tmp_path) == FishMask(first)
    assert FishMask.from_pretrained(tmp_path / "other") == FishMask(second)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Mlp(), tmp_path / "other", adapter_name="other").eval()
    torch.testing.assert_close(loaded(inputs()), model(inputs()))
    model.add_weighted_adapter(["default", "other"], [0.7, 0.3], "mix", combination_type="cat")
    twin = remove_mask(copy.deepcopy(model))
    twin.delete_adapter("mix")
    twin.add_weighted_adapter(["default", "other"], [0.7, 0.3], "mix", combination_type="cat")
    for each in (model, twin):
        each.set_adapter("mix")
    torch.testing.assert_close(model(inputs()), twin(inputs()))


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_deleted_adapter_leaves_the_mask(kind):
    """Guards against values, names or files of an adapter that is gone, and one of its name."""

    def config():
        if kind == "lora":
            return LoraConfig(**LORA)
        names = ["first"]
        return IA3Config(target_modules=names, feedforward_modules=[], init_ia3_weights=False)

    model = get_peft_model(Mlp(), config()).eval()
    model.add_adapter("other", config())
    mask = {n: torch.rand(p.shape) < 0.5 for n, p in model.named_parameters() if "default" in n}
    apply_mask(model, mask)
    model(inputs())
    model.set_adapter("other")
    model.delete_adapter("default")
    assert not is_masked(model) and get_mask(model) is None
    assert not any("default" in name for name in model.state_dict())
    assert not any("values" in name for name, _ in model.named_parameters())
    model.add_adapter("default", config())
    model.set_adapter("default")
    model(inputs()).sum().backward()
    added = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert added and all("default" in n and p.grad is not None for n, p in added.items())


def test_one_of_two_masked_adapters_is_deleted():
    """Guards the other one's values, its tensors and its further training."""
    model, _, second = two_adapters()
    train(model)
    model.delete_adapter("default")
    assert get_mask(model) == FishMask(second)
    model.set_adapter("other")
    train(model)
    assert_close(adapter_tensors(model, "other"), trained_alone("other"))


FREEZING = {
    "inference_mode": lambda model: model.set_adapter("default", inference_mode=True),
    "set_requires_grad": lambda model: model.set_requires_grad("default", False),
    "requires_grad_": lambda model: model.requires_grad_(False),
    "disable_adapter_layers": lambda model: model.base_model.disable_adapter_layers(),
    "by_name": lambda model: [p.requires_grad_(False) for p in model.parameters()],
}


@pytest.mark.parametrize("how", FREEZING)
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_frozen_adapter_is_not_trained(kind, how):
    """Guards against PEFT's own ways of freezing that do not reach the values."""
    config = (
        LoraConfig(**LORA)
        if kind == "lora"
        else IA3Config(target_modules=["first"], feedforward_modules=[])
    )
    model = get_peft_model(Mlp(), config)
    apply_mask(
        model,
        {n: torch.rand(p.shape) < 0.5 for n, p in model.named_parameters() if p.requires_grad},
    )
    FREEZING[how](model)
    assert not any(p.requires_grad for p in model.parameters())
    x = inputs().requires_grad_()
    model(x).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    model.base_model.enable_adapter_layers()
    model.set_adapter("default")
    assert all(values.requires_grad for values in masked_parameters(model))
    model(x).sum().backward()
    assert any(values.grad is not None for values in masked_parameters(model))


def test_an_unselected_tensor_follows_its_adapter():
    """Guards against a tensor that is trainable after the mask although its adapter is not."""
    model = lora_mlp()
    mask = random_mask(model)
    name = next(name for name in mask if "lora_A" in name)
    mask[name].zero_()
    add_adapter(model, "other", 1)
    apply_mask(model, mask)
    model.set_adapter("other")
    remove_mask(model)
    assert not model.get_parameter(name).requires_grad
    model.set_adapter("default")
    assert model.get_parameter(name).requires_grad


def test_loraplus_gives_a_and_b_their_rates():
    """Guards against PEFT's LoRA+, which sorts parameters by name and dimension."""
    model, twin = lora_mlp(), lora_mlp()
    mask = random_mask(model)
    apply_mask(model, mask)
    settings = {"optimizer_cls": torch.optim.AdamW, "lr": 0.01, "loraplus_lr_ratio": 16}
    ours, dense = (create_loraplus_optimizer(each, **settings) for each in (model, twin))
    for step in range(5):
        for each, optimizer in ((model, ours), (twin, dense)):
            optimizer.zero_grad()
            each(inputs(step)).square().sum().backward()
        for name, p in twin.named_parameters():
            if name in mask:
                p.grad *= mask[name]
        ours.step(), dense.step()
    assert_close(adapter_tensors(model), adapter_tensors(twin))


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
@pytest.mark.parametrize("config", [{}, {"bias": "all"}, {"modules_to_save": ["last"]}])
def test_an_unloaded_model_is_an_ordinary_one(config, how):
    """Guards against hooks, buffers or values that stay in the base model."""
    model, twin = lora_mlp(**config), lora_mlp(**config)
    mask = {n: torch.rand(p.shape) < 0.5 for n, p in model.named_parameters() if p.requires_grad}
    apply_mask(model, mask)
    base, plain = (getattr(each, how)() for each in (model, twin))
    assert [n for n, _ in base.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert torch.equal(base(inputs()), plain(inputs()))
    for each in (base, copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
        assert not list(each.named_buffers()) and not is_masked(each)
        assert all(not m._forward_pre_hooks and not m._state_dict_hooks for m in each.modules())
        assert all("_apply" not in vars(m) for m in each.modules())
        each.requires_grad_(True)(inputs()).sum().backward()
        assert all(p.grad is not None for p in each.parameters())


def test_the_inner_model_outlives_the_masked_one():
    """Guards against half a mask in the modules that are left."""
    model = lora_mlp()
    apply_mask(model, random_mask(model))
    inner, expected = model.base_model.model, model(inputs())
    del model
    gc.collect()
    assert {n for n, p in inner.named_parameters() if p.requires_grad} == {
        "first.lora_A.default.weight",
        "first.lora_B.default.weight",
    }
    for each in (inner, copy.deepcopy(inner), pickle.loads(pickle.dumps(inner))):
        assert torch.equal(each(inputs()), expected)
        each(inputs()).sum().backward()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))])
def test_a_copy_of_a_part_is_dense(how):
    """Guards against a copied layer that keeps a copy of the whole model's mask."""
    model = lora_mlp()
    apply_mask(model, random_mask(model))
    layer = how(model.base_model.model.first)
    gc.collect()
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {
        "lora_A.default.weight",
        "lora_B.default.weight",
    }
    assert torch.equal(layer(inputs()), model.base_model.model.first(inputs()))
    assert is_masked(model)
    train(model)
    assert masked_parameters(model)


class Resized(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.embedding(x))


def resize(model):
    model.embedding.weight.data = torch.ones(9, 4)


def replace_head(model):
    model.head = nn.Linear(4, 2)


@pytest.mark.parametrize("change", [resize, replace_head])
def test_a_mask_that_no_longer_fits(change):
    """Guards against training beside the mask after a layer was replaced or resized."""
    model = Resized()
    mask = {name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters()}
    apply_mask(model, mask)
    change(model)
    name = "embedding.weight is" if change is resize else "head.weight is no longer in it"
    with pytest.raises(RuntimeError, match=f"no longer fits the model: {name}.*remove_mask"):
        model(torch.tensor([1, 2]))
    remove_mask(model)
    assert {n for n, _ in model.named_parameters()} == set(mask)
    model(torch.tensor([1, 2])).sum().backward()


@pytest.mark.parametrize("masked", [["head"], ["first"], ["first", "head"]], ids="+".join)
def test_conversion_to_lora(masked):
    """Guards against converted adapters that hold values in place of the tensors of a head."""
    torch.manual_seed(0)
    config = LoKrConfig(r=2, target_modules=["first"], modules_to_save=["last"], init_weights=False)
    model = get_peft_model(Mlp(), config).eval()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    part = {name: "head" if ".last." in name else "first" for name in trained}
    expected = convert_to_lora(model, rank=4)[1]
    apply_mask(model, {n: p > 0 for n, p in trained.items() if part[n] in masked})
    if "head" in masked:
        with pytest.raises(ValueError, match=r"with modules_to_save to LoRA.*call remove_mask"):
            convert_to_lora(model, rank=4)
        remove_mask(model)
    assert_close(convert_to_lora(model, rank=4)[1], expected)


def cast_around(model, to=torch.float64, back=torch.float32, no_grad=False):
    """Has every linear layer compute in another type, as diffusers' layerwise casting does."""

    def cast(layer, dtype):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not no_grad):
            layer.to(dtype)

    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(lambda layer, args: cast(layer, to))
            layer.register_forward_hook(lambda layer, args, output: cast(layer, back))


def gradients(model, mask):
    """The gradients of the selected entries, of a masked model or a dense one."""
    parameters = dict(model.named_parameters())
    return {
        name: parameters[name].grad.flatten()
        if parameters[name].shape != bits.shape
        else parameters[name].grad[bits].float()
        for name, bits in mask.items()
    }


@pytest.mark.parametrize("no_grad", [False, True], ids=["grad", "no grad"])
@pytest.mark.parametrize("how", ["whole", "part", "checkpointed"])
def test_layers_cast_while_they_compute(how, no_grad):
    """Guards against gradients that a cast in the middle of a pass keeps from the values."""
    plain, masked = lora_mlp(), lora_mlp()
    mask = random_mask(plain)
    apply_mask(masked, mask)
    x = inputs().double().requires_grad_()
    for model in (plain, masked):
        cast_around(model, no_grad=no_grad)
        first = model.get_base_model().first
        forward = first.forward
        if how == "checkpointed":
            first.forward = lambda x, f=forward: checkpoint(f, x, use_reentrant=True)
        with disable_input_dtype_casting(model):
            for _ in range(2):
                (first if how == "part" else model)(x).square().sum().backward()
    assert_close(gradients(masked, mask), gradients(plain, mask))


@pytest.mark.parametrize("idle", [False, True])
def test_another_model_takes_the_layers_over(idle, tmp_path):
    """Guards against a mask that stops the adapter which another PeftModel put in its place."""

    def taken_over(masked):
        model = lora_mlp(init_lora_weights=True, target_modules=["first", "last"])
        if masked:
            mask = random_mask(model)
            apply_mask(model, {n: b & ("first" not in n or not idle) for n, b in mask.items()})
        model.save_pretrained(tmp_path)
        return model, PeftModel.from_pretrained(model.get_base_model(), tmp_path, is_trainable=True)

    (old, new), (_, plain) = taken_over(True), taken_over(False)
    for model in (new, plain):
        train(model)
    assert_close(adapter_tensors(new), adapter_tensors(plain))
    assert adapter_tensors(new)["base_model.model.first.lora_B.default.weight"].any()
    with pytest.raises(RuntimeError, match="no longer fits"):
        old(inputs())


def test_parameters_cast_while_they_compute_are_told(caplog):
    """Guards against an error about types alone, where the data of parameters is cast by hand."""

    def cast(layer, args):
        for p in layer.parameters(recurse=False):
            p.data = p.data.double()

    model = lora_mlp()
    apply_mask(model, random_mask(model))
    for layer in model.modules():
        layer.register_forward_pre_hook(cast)
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        model(inputs().double())
    (record,) = caplog.records
    assert "cast modules, as in layer.to(dtype)" in record.message


def test_a_masked_tensor_is_found_by_name():
    model = lora_mlp()
    mask = random_mask(model)
    apply_mask(model, mask)
    for name, tensor in adapter_tensors(model).items():
        assert torch.equal(model.get_parameter(name), tensor)
