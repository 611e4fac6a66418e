"""Tensors kept for the backward pass in the way in which autograd keeps its own."""

from typing import Any

import torch
from torch import Tensor


class Kept:
    """A tensor of the forward pass that is needed again in the backward pass.

    A reference to it would defeat gradient checkpointing, which frees such tensors and computes
    them again. Checkpointing, like offloading, knows only of the tensors that autograd saves, so
    this one is saved for an autograd function that is never called.

    Args:
        tensor: The tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        # Without a leaf that requires gradients there would be no function.
        leaf = torch.empty(0, requires_grad=True)
        apply: Any = _Keep.apply  # untyped
        # `data` rather than `detach()`: a model may overwrite an input that autograd does not need
        # (a bias has a gradient without it). The comparison with autograd finds what is wrong then.
        # The result is kept, not its function: in older versions of torch (2.11, for one) a
        # function lets go of what it saved once its result is gone.
        self._result: Tensor | None = apply(leaf, tensor.data)

    def get(self, *, last: bool) -> Tensor:
        """The tensor, at most once in each backward pass; after the last time it is let go."""
        assert self._result is not None
        function: Any = self._result.grad_fn  # untyped
        (tensor,) = function.saved_tensors
        if last:
            self._result = None
        return tensor  # type: ignore[no-any-return]


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return torch.empty_like(leaf)
