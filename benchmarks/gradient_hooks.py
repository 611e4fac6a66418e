"""Masked training as the first public implementation does it: a hook for every gradient.

All entries stay parameters. A hook multiplies each tensor's gradient by a float32 mask of its size,
and AdamW keeps its two dense states for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def mask_gradients(model: nn.Module, mask: Mapping[str, Tensor]) -> None:
    """Hooks the parameters that a mask names.

    Args:
        model: The model with its adapter on it.
        mask: Parameter name to boolean tensor.
    """
    for name, parameter in list(model.named_parameters()):
        if name in mask:
            ones = mask[name].to(parameter.device, parameter.dtype)
            model.register_buffer(f"mask_of_{name.replace('.', '_')}", ones, persistent=False)
            parameter.register_hook(lambda gradient, ones=ones: gradient * ones)
