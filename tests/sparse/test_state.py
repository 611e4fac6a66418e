"""What a masked model says of optimizers and of masks that leave something out."""

import logging

import pytest
import torch
from torch.func import functional_call, grad

from fish_tuning import apply_mask, get_mask
from fish_tuning.sparse import is_masked, masked_parameters
from tests.sparse.small import inputs, lora_mlp, random_mask


def steps(model, *optimizers, count=3):
    for _ in range(count):
        model(inputs()).sum().backward()
        for optimizer in optimizers:
            optimizer.step()


def test_an_optimizer_without_the_values_is_told(caplog):
    """Guards against a plain loop that trains nothing, with an optimizer built too early."""
    model = lora_mlp()
    early = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    apply_mask(model, random_mask(model))
    before = [values.detach().clone() for values in masked_parameters(model)]
    caplog.clear()
    steps(model, early)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "no optimizer holds any of them" in record.message
    for values, old in zip(masked_parameters(model), before, strict=True):
        assert torch.equal(values, old)


def test_one_of_several_optimizers_is_not_told(caplog):
    """Guards against a warning about an optimizer of something else."""
    model = lora_mlp()
    apply_mask(model, random_mask(model))
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)
    caplog.clear()
    steps(model, other, torch.optim.SGD(masked_parameters(model), 0.1))
    assert not caplog.records


def test_a_mask_that_leaves_tensors_out(caplog):
    """Guards against a mask of a smaller model, beside which everything else is trained."""
    model = lora_mlp(target_modules=["first", "last"])
    bits_by_name = random_mask(model)
    mask = {n: bits for n, bits in bits_by_name.items() if ".first." in n}
    apply_mask(model, mask)
    (record,) = caplog.records
    count = sum(bits.sum() for bits in mask.values())
    assert "leaves out 2 trainable tensors, all 40 entries of which" in record.message
    assert f"beside the {count} that it selects" in record.message
    apply_mask(model, {n: bits for n, bits in bits_by_name.items() if n not in mask})
    assert len(caplog.records) == 1


def test_wrapped_models_are_masked():
    """Guards against a wrapper through which a mask is not found."""
    model = lora_mlp()
    assert not is_masked(model)
    apply_mask(model, random_mask(model))
    compiled = torch.compile(model, backend="eager")
    parallel = torch.nn.parallel.DistributedDataParallel.__new__(
        torch.nn.parallel.DistributedDataParallel
    )
    torch.nn.Module.__init__(parallel)
    parallel.module = model
    for each in (model, compiled, parallel):
        assert is_masked(each) and get_mask(each) == get_mask(model)


def test_transforms_of_functions_are_refused():
    """Guards against a sentence about autograd's insides, and a model that then works no more."""
    model = lora_mlp()
    apply_mask(model, random_mask(model))
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    expected = model(inputs())
    with pytest.raises(RuntimeError, match=r"torch\.func's transforms .* call remove_mask"):
        grad(lambda p: functional_call(model, p, inputs()).sum())(parameters)
    assert torch.equal(model(inputs()), expected)
    functional_call(model, dict(model.named_parameters()), inputs()).sum().backward()
    assert all(values.grad is not None for values in masked_parameters(model))
