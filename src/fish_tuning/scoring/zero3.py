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
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fish_tuning.engines import is_in_zero_3


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """Inside the block, all processes can pass through the model together."""
    layers = [layer for module in dict.fromkeys(_users(model)) if (layer := _Layer(module)).divided]
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.divide)
            for hook in layer.hooks():
                stack.callback(hook.remove)
        try:
            yield
        except RuntimeError as error:
            if layers:
                error.add_note(
                    "DeepSpeed ZeRO-3 has divided the model's weights, and scoring brings those "
                    "of a module together while it runs. If the model uses the weights of a "
                    "module without calling it, load the model before there is a config of stage "
                    "3, or divide it with fully_shard"
                )
            raise


class _Layer:
    """A module and the parameters that ZeRO-3 has divided of it: those that it uses itself.

    Adapter layers compute with the weights of the layer inside them, as DoRA's does, and
    `nn.MultiheadAttention` with those of its output projection, without calling it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        owners = module.modules() if _uses_all(module) else [module]
        self._held: list[tuple[dict[str, Any], str, Any]] = [
            (owner._parameters, attribute, parameter)
            for owner in owners
            for attribute, parameter in owner._parameters.items()
            if parameter is not None and is_in_zero_3(parameter)
        ]
        self.divided = list(dict.fromkeys(parameter for *_, parameter in self._held))

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

    def _is_replaced(self) -> bool:
        """Whether a layer runs again by itself, with whole tensors in place of its parameters."""
        return any(
            held.get(attribute) is not parameter for held, attribute, parameter in self._held
        )

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if self._is_replaced():
            return None
        self.gather()
        marked: tuple[Any, Any] = self._calling_in_backward(self.divide, (args, kwargs))
        return marked

    def _after(self, module: nn.Module, args: Any, outputs: Any) -> Any:
        if self._is_replaced():
            return None
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


def _uses_all(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer | nn.MultiheadAttention)


def _users(module: nn.Module) -> Iterator[nn.Module]:
    """A module and those in it, without what is inside a module that uses all of its parameters."""
    yield module
    if not _uses_all(module):
        for child in module.children():
            yield from _users(child)


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
