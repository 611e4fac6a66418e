"""A kept tensor is there in the backward pass, and not kept where autograd would not keep it."""

import gc
import weakref

import torch
from torch.utils.checkpoint import checkpoint

from fish_tuning.per_example.kept import Kept


def test_is_the_tensor():
    """Guards the value, also without anything that requires gradients, and several passes."""
    x = torch.randn(3)
    kept, storage, copy = Kept(x), weakref.ref(x.untyped_storage()), x.clone()
    del x
    gc.collect()
    assert torch.equal(kept.get(last=False), copy)
    assert storage() is not None
    assert torch.equal(kept.get(last=True), copy)
    assert storage() is None


def test_may_be_overwritten():
    """Guards against an error about an input that a module's gradient may not even need."""
    x = torch.randn(3)
    kept = Kept(x)
    x += 1
    assert torch.equal(kept.get(last=True), x)


def test_is_computed_again_under_checkpointing():
    """Guards the memory of checkpointing: the tensor is gone after the forward pass."""
    found, storages = [], []

    def layer(x):
        hidden = x * 2
        storages.append(weakref.ref(hidden.untyped_storage()))
        kept = Kept(hidden)
        y = hidden.exp()
        y.register_hook(lambda g: found.append(kept.get(last=True)))
        return y

    x = torch.randn(3, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=False)
    gc.collect()
    assert storages[0]() is None
    y.sum().backward()
    torch.testing.assert_close(found[0], x * 2)
