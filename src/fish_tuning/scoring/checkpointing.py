"""Gradient checkpointing in evaluation mode."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

_CACHES = ("past_key_values", "layer_past")


@contextmanager
def checkpointing(model: nn.Module) -> Iterator[None]:
    """Inside the block, layers with gradient checkpointing have it in evaluation mode too.

    transformers leaves it out unless a layer is in training mode, where dropout would be on.
    Reentrant checkpointing becomes the other kind, which computes the same and works with
    `torch.autograd.grad`.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    ]
    # An instance may have a forward of its own (accelerate's hooks).
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        vars(layer)["forward"] = partial(_checkpointed, layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del vars(layer)["forward"]
            else:
                vars(layer)["forward"] = forward


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if any(kwargs.get(name) is not None for name in _CACHES):
        # Running the layer again would write to the cache again.
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
