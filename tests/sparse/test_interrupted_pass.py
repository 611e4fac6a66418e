"""A forward pass that ends with Ctrl-C leaves a masked model as usable as a plain one."""

import copy

import pytest
import torch

from fish_tuning import apply_mask, remove_mask
from fish_tuning.sparse import masked_parameters
from tests.models import examples_for, pad, tiny_bert, with_lora


def interrupted_model():
    """A masked model whose last forward pass was interrupted, and a batch for it."""
    model = with_lora(tiny_bert()).eval()
    masks = {
        name: torch.rand(p.shape, generator=torch.Generator().manual_seed(0)) < 0.5
        for name, p in model.named_parameters()
        if "lora_" in name
    }
    apply_mask(model, masks)
    batch = pad(examples_for(model, 3))

    def press_ctrl_c(*args):
        raise KeyboardInterrupt

    handle = model.get_base_model().classifier.register_forward_pre_hook(press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        model(**batch)
    handle.remove()
    return model, batch


@pytest.mark.parametrize("part", ["model", "layer"])
def test_a_copy_right_after(part):
    """Guards against an error of torch's about tensors that are no leaves."""
    model, batch = interrupted_model()
    if part == "model":
        copied = copy.deepcopy(model)
        assert torch.equal(copied(**batch).logits, model(**batch).logits)
        loss = copied(**batch).logits.sum()
        loss.backward()
        trained = [p for p in copied.parameters() if p.requires_grad]
        assert trained and all(p.grad is not None for p in trained if p.numel())
    else:
        layer = model.get_base_model().bert.encoder.layer[0].attention.self.query
        x = torch.ones(1, layer.in_features)
        copied = copy.deepcopy(layer)
        assert torch.equal(copied(x), layer(x))


def test_skipped_layers_count_again():
    """Guards a layer that was skipped when the pass was interrupted against being lost."""
    model = with_lora(tiny_bert()).eval()
    masks = {
        name: torch.full(p.shape, ".layer.1." in name)
        for name, p in model.named_parameters()
        if "lora_" in name
    }
    apply_mask(model, masks)
    skipped = model.get_base_model().bert.encoder.layer[0].attention.self.query

    def press_ctrl_c(*args):
        raise KeyboardInterrupt

    handle = skipped.base_layer.register_forward_pre_hook(press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        model(**pad(examples_for(model, 3)))
    handle.remove()
    remove_mask(model)
    assert skipped.active_adapters == ["default"]


def values_of(model):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(values)]: values for values in masked_parameters(model)}


def test_numbers_written_afterwards_count():
    """Guards values written by hand against a forward pass that believes to be a nested one."""
    model, batch = interrupted_model()
    with torch.no_grad():
        for values in values_of(model).values():
            values.zero_()
    model(**batch).loss.backward()
    for name, values in values_of(model).items():
        assert not values.detach().any()
        held = model.get_parameter(name)
        assert held.is_leaf
        assert int((held == 0).sum()) >= values.numel()
    assert any(values.grad is not None for values in values_of(model).values())


def test_casts_afterwards():
    """Guards casts, and copies after them, against tensors of the interrupted pass's graph."""
    model, batch = interrupted_model()
    model.to(torch.float64)
    expected = model(**batch).logits
    actual = copy.deepcopy(model)(**batch).logits
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("change", ["copy", "cast"])
def test_inference_mode(change):
    """Guards models that are copied or cast in inference mode, whose tensors have no versions."""
    model, batch = interrupted_model()
    with torch.inference_mode():
        model(**batch)
        changed = copy.deepcopy(model) if change == "copy" else model.double()
        assert changed(**batch).logits.isfinite().all()
