"""Values and tensors hold the same numbers: of each entry, the copy that was written last."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel

from fish_tuning import apply_mask, remove_mask
from fish_tuning.masked_tensors.reconcile import reconcile
from fish_tuning.sparse import masked_parameters
from fish_tuning.sparse.registry import state_of
from tests.sparse.small import LORA, Mlp, inputs, lora_mlp, random_mask, train

NAME = "base_model.model.first.lora_B.default.weight"


def masked():
    model = lora_mlp()
    mask = random_mask(model)
    return apply_mask(model, mask), mask[NAME]


def tensor(model):
    return model.base_model.model.first.lora_B["default"].weight


def values(model):
    return dict(model.named_parameters())[NAME]


def copy_into(weight, new):
    with torch.no_grad():
        weight.copy_(new)


def init_with(weight, new):
    with torch.no_grad():
        nn.init.zeros_(weight).add_(new)


def write_data(weight, new):
    weight.data.copy_(new)


def swap_data(weight, new):
    weight.data = new.clone()


READS = {
    "forward": lambda model: model(inputs()),
    "no_grad": lambda model: torch.no_grad()(model)(inputs()),
    "state_dict": lambda model: model.state_dict(),
    "module_state_dict": lambda model: model.base_model.model.first.lora_B.state_dict(),
    "merge": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    "remove_mask": remove_mask,
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("write", [copy_into, init_with, write_data, swap_data])
def test_a_tensor_that_was_written(write, read):
    """Guards against values that undo half of what somebody wrote who knows nothing of masks."""
    model, bits = masked()
    train(model, steps=1)
    new = torch.arange(32.0).view(8, 4)
    write(tensor(model), new)
    kept = values(model)
    READS[read](model)
    assert torch.equal(tensor(model), new)
    if read != "remove_mask":
        assert torch.equal(values(model).view(-1), new[bits])
        assert values(model) is kept
        torch.testing.assert_close(model.state_dict()[NAME], new)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("write", [copy_into, write_data, swap_data])
def test_values_that_were_written(write, read):
    """Guards against an average that is swapped in and not merged, saved or used."""
    model, bits = masked()
    before = tensor(model).detach().clone()
    write(values(model), torch.full_like(values(model), 7.0))
    READS[read](model)
    expected = torch.where(bits, 7.0, before)
    assert torch.equal(tensor(model), expected)


def test_merged_deltas_are_those_of_the_values():
    """Guards against merging what was there before somebody wrote the values."""
    model, _ = masked()
    for each in masked_parameters(model):
        each.data.zero_()
    layer = model.base_model.model.first
    delta = layer.get_delta_weight("default")
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(delta, b @ a * layer.scaling["default"])
    remove_mask(model)
    torch.testing.assert_close(layer.get_delta_weight("default"), delta)


def test_different_entries_may_be_written_in_both():
    """Guards against one write that takes the other back, where they do not touch."""
    model, bits = masked()
    positions = bits.nonzero()
    values(model).data[0] = 3.0
    tensor(model).data[tuple(positions[1])] = 4.0
    model(inputs())
    assert tensor(model)[tuple(positions[0])] == values(model)[0] == 3
    assert tensor(model)[tuple(positions[1])] == values(model)[1] == 4


def test_both_written_is_an_error():
    """Guards against a guess which of two different numbers is meant."""
    model, _ = masked()
    values(model).data.fill_(3.0)
    tensor(model).data.fill_(4.0)
    for read in (READS["forward"], READS["state_dict"], READS["merge"]):
        with pytest.raises(RuntimeError, match=r"lora_B\.default\.weight and its trained values"):
            read(model)
    tensor(model).data.fill_(3.0)
    model(inputs())
    assert (tensor(model) == 3).all()


def test_nan_equals_itself():
    """Guards against values that seem written at every pass since they are no numbers."""
    model, _ = masked()
    values(model).data.fill_(torch.nan)
    model(inputs())
    tensor(model).data.fill_(1.0)
    model(inputs())
    assert (values(model) == 1).all()


def test_a_parameter_assigned_in_place_of_a_tensor():
    """Guards against a dense parameter that is trained beside the values."""
    model, _bits = masked()
    held = values(model)
    new = nn.Parameter(torch.ones(8, 4))
    model.base_model.model.first.lora_B["default"].weight = new
    model(inputs()).sum().backward()
    assert values(model) is held
    assert (values(model) == 1).all()
    assert torch.equal(tensor(model), torch.ones(8, 4))
    assert values(model).grad.count_nonzero()


@pytest.mark.parametrize("part", ["base_model.model.first.lora_B", "base_model.model.first", ""])
def test_a_cast_of_a_part_of_the_model(part):
    """Guards against tensors of two types in one group, and leaves that are leaves no longer."""
    model, _bits = masked()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    model.get_submodule(part).double()
    assert all(b.is_leaf for b in model.buffers())
    model.double()(inputs().double()).sum().backward()
    for name, tensor_now in model.state_dict().items():
        assert tensor_now.dtype == torch.float64
        assert torch.equal(tensor_now.float(), before[name])
    assert values(model).grad.dtype == torch.float64


def test_a_write_that_comes_before_a_backward_fails_as_without_a_mask():
    """Guards against gradients of a tensor that has changed since."""
    model, _ = masked()
    loss = model(inputs()).square().sum()
    copy_into(tensor(model), torch.ones(8, 4))
    copy_into(model.base_model.model.first.lora_A["default"].weight, torch.ones(4, 6))
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()


def test_a_mask_of_base_weights_takes_what_is_loaded():
    """Guards against a warning of missing keys, and values that are older than what is loaded."""
    model = Mlp()
    mask = {name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters()}
    apply_mask(model, mask)
    for each in masked_parameters(model):
        each.data.fill_(5.0)
    source = Mlp().state_dict()
    result = model.load_state_dict(source)
    assert not result.missing_keys and not result.unexpected_keys
    for name, expected in source.items():
        assert torch.equal(model.state_dict()[name], expected)


def test_a_cast_of_parameters_alone():
    """Guards against tensors of another type than the values, which DeepSpeed casts by data."""
    model = lora_mlp()
    mask = random_mask(model)
    mask[NAME.replace("lora_B", "lora_A")].zero_()
    apply_mask(model, mask)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for p in model.parameters():
        p.data = p.data.bfloat16()
    model(inputs().bfloat16()).sum().backward()
    for name, now in model.state_dict().items():
        assert now.dtype == torch.bfloat16
        assert torch.equal(now, before[name].bfloat16())
    assert values(model).grad.dtype == torch.bfloat16


def test_accelerators_tell_of_a_conflict_when_something_is_saved(monkeypatch):
    """Guards the way without a wait for the answer, which forward passes on accelerators take."""
    model, bits = masked()
    group = state_of(model).groups[0]
    with monkeypatch.context() as patched:
        patched.setattr(torch.compiler, "is_compiling", lambda: True)
        tensor(model).data.fill_(4.0)
        reconcile(group)
        assert (values(model) == 4).all() and not group.has_conflict
        values(model).data[1:] = 5.0
        reconcile(group)
        assert torch.equal(tensor(model)[bits], values(model).view(-1))
        values(model).data.fill_(6.0)
        tensor(model).data.fill_(7.0)
        reconcile(group)
    with pytest.raises(RuntimeError, match="were both written"):
        model.state_dict()
    model.state_dict()


def averaged(model, **kwargs):
    """The mean of the weights after each of three steps."""
    mean = AveragedModel(model, **kwargs)
    for _ in range(3):
        train(model, steps=1)
        mean.update_parameters(model)
    return mean


@pytest.mark.parametrize("use_buffers", [True, False])
def test_averages_of_weights(use_buffers):
    """Guards against averages of the values alone, beside tensors copied from the model."""
    model, _ = masked()
    mean = averaged(model, use_buffers=use_buffers)
    plain, _ = masked()
    states = []
    for _ in range(3):
        train(plain, steps=1)
        states.append({n: t.clone() for n, t in plain.state_dict().items()})
    for name, found in mean.module.state_dict().items():
        expected = torch.stack([state[name] for state in states]).mean(0)
        torch.testing.assert_close(found, expected)


def test_tensors_tied_after_they_were_masked_are_noticed():
    """Guards against one weight that becomes two again, without a word."""
    layers = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model = get_peft_model(layers, LoraConfig(**{**LORA, "target_modules": ["0", "1"]}))
    first, last = (layer.lora_B["default"] for layer in model.base_model.model)
    apply_mask(model, random_mask(model))
    last.weight = first.weight
    for read in (model.state_dict, lambda: model(inputs())):
        with pytest.raises(RuntimeError, match=r"were tied after they were masked: call remove"):
            read()
    remove_mask(model)
    assert torch.equal(last.weight, first.weight)


def test_whole_tensors_in_place_of_values():
    """Guards against scripts that write the tensors of a state dict into parameters, by name."""
    model, bits = masked()
    held = values(model)
    held.data = torch.ones(tensor(model).shape)
    model(inputs())
    assert values(model) is held
    assert held.shape == (int(bits.sum()), 1)
    assert (tensor(model) == 1).all() and (held == 1).all()


def test_other_tensors_in_place_of_values_are_refused():
    """Guards against a message about engines where somebody has written the wrong parameter."""
    model, _ = masked()
    values(model).data = torch.ones(3, *tensor(model).shape)
    with pytest.raises(RuntimeError, match="write a whole tensor as load_state_dict does"):
        model(inputs())
