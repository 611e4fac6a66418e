"""Passes through a model whose base weights DeepSpeed ZeRO-3 has divided as it was loaded.

transformers loads a model that way while there is a config of stage 3. Each process holds a slice
of every weight, and adapters that are added later in full. Until an engine takes the model, nothing
brings the weights together; here, those of a module are whole for as long as the module runs,
forward or backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fish_tuning.engines import is_in_zero_3


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """Inside the block, all processes can pass through the model together."""
    layers = [layer for module in model.modules() if (layer := _Layer(module)).divided]
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.divide)
            for hook in layer.hooks():
                stack.callback(hook.remove)
        yield


class _Layer:
    """A module and those of its own parameters that ZeRO-3 has divided."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        own = module.parameters(recurse=False)
        self.divided: list[Any] = [p for p in own if is_in_zero_3(p)]

    def hooks(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Install the hooks of forward and backward passes."""
        yield self._module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)
        yield self._module.register_forward_hook(self._after, always_call=True)

    def gather(self) -> None:
        """Bring the parameters together."""
        self.divided[0].all_gather(self.divided)

    def divide(self) -> None:
        """Leave this process its slices."""
        self.divided[0].partition(self.divided)

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self.gather()
        marked: tuple[Any, Any] = self._calling_in_backward(self.divide, (args, kwargs))
        return marked

    def _after(self, module: nn.Module, args: Any, outputs: Any) -> Any:
        # A checkpointed layer that runs again in a backward pass is about to need them once more.
        if torch._C._current_graph_task_id() == -1:
            self.divide()
        return self._calling_in_backward(self.gather, outputs)

    @staticmethod
    def _calling_in_backward(call: Callable[[], None], values: Any) -> Any:
        """The same values, whose gradients together cause a call before they go on."""
        leaves, structure = tree_flatten(values)
        wanted = [i for i, leaf in enumerate(leaves) if _needs_gradient(leaf)]
        if wanted:
            identity: Any = _Call.apply  # untyped
            marked = identity(call, *(leaves[i] for i in wanted))
            for i, tensor in zip(wanted, marked, strict=True):
                leaves[i] = tensor
        return tree_unflatten(leaves, structure)


def _needs_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


class _Call(torch.autograd.Function):
    """The identity, whose backward pass calls a function first."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.call()
        return None, *gradients
