"""Passes through a model whose base weights DeepSpeed ZeRO-3 has divided as it was loaded.

transformers loads a model that way while there is a config of stage 3. Each process holds a slice
of every weight, and adapters that are added later in full. Until an engine takes the model, nothing
brings the weights together; here, those of a module are whole for as long as the module runs,
forward or backward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fish_tuning.engines import is_away, is_in_zero_3


@contextmanager
def gathering(model: nn.Module) -> Iterator[None]:
    """Inside the block, all processes can pass through the model together."""
    if not any(map(is_in_zero_3, model.parameters())):
        yield
        return
    passes = _Passes()
    with ExitStack() as stack:
        for module in model.modules():
            stack.enter_context(passes.reading(module))
            layer = _Layer(module, passes)
            stack.callback(layer.divide)
            for hook in layer.hooks():
                stack.callback(hook.remove)
        yield


class _Passes:
    """The modules that run, and how many of them need a parameter to be whole."""

    def __init__(self) -> None:
        self.running: list[_Layer] = []
        self.needed: Counter[Any] = Counter()

    @contextmanager
    def reading(self, module: nn.Module) -> Iterator[None]:
        """Inside the block, a parameter is whole for those that read it, whosever it is.

        DoRA computes with the weight of the layer inside it, and `nn.MultiheadAttention` with that
        of its output projection, without calling them.
        """
        held = module._parameters
        vars(module)["_parameters"] = _Parameters(held, self._on_read)
        try:
            yield
        finally:
            held.update(module._parameters)
            vars(module)["_parameters"] = held

    def _on_read(self, owner: dict[str, Any], name: str, parameter: Any) -> None:
        if self.running:
            self.running[-1].need(owner, name, parameter)


class _Parameters(dict[str, Any]):
    """Parameters of a module that tell when one is read that is away."""

    def __init__(
        self, held: dict[str, Any], on_read: Callable[[dict[str, Any], str, Any], None]
    ) -> None:
        super().__init__(held)
        self._on_read = on_read

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        if parameter is not None and is_away(parameter):
            self._on_read(self, name, parameter)
        return parameter


class _Layer:
    """A module, and the parameters that it needs: its own, and others that it has read."""

    def __init__(self, module: nn.Module, passes: _Passes) -> None:
        self._module, self._passes = module, passes
        held = module._parameters
        self._needs: dict[Any, tuple[dict[str, Any], str]] = {
            p: (held, name) for name, p in held.items() if p is not None and is_in_zero_3(p)
        }
        self._has = False
        """Whether they are whole for its sake."""

    def hooks(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Install the hooks of forward and backward passes."""
        yield self._module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)
        yield self._module.register_forward_hook(self._after, always_call=True)

    def need(self, owner: dict[str, Any], name: str, parameter: Any) -> None:
        """Have a parameter whole in this pass and in those that follow."""
        if parameter not in self._needs:
            self._needs[parameter] = owner, name
            self._passes.needed[parameter] += 1
        self._has = True
        parameter.all_gather([parameter])

    def gather(self) -> None:
        """Bring the parameters together."""
        if self._has or not self._needs:
            return
        self._has = True
        self._passes.needed.update(list(self._needs))
        first, *_ = needs = list(self._needs)
        first.all_gather(needs)

    def divide(self) -> None:
        """Leave this process its slices of those that no other module needs at the moment."""
        if not self._has:
            return
        self._has = False
        self._passes.needed.subtract(list(self._needs))
        if idle := [p for p in self._needs if not self._passes.needed[p]]:
            idle[0].partition(idle)

    def _runs_with_others(self) -> bool:
        """Whether the module runs again by itself, with whole tensors in place of parameters."""
        return any(owner.get(name) is not p for p, (owner, name) in self._needs.items())

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if self._runs_with_others():
            return None
        self._passes.running.append(self)
        if not self._needs:
            return None
        self.gather()
        marked: tuple[Any, Any] = self._calling_in_backward(self.divide, (args, kwargs))
        return marked

    def _after(self, module: nn.Module, args: Any, outputs: Any) -> Any:
        if self._runs_with_others():
            return None
        # Those that were called meanwhile, and interrupted, no longer run either.
        while self._passes.running and self._passes.running.pop() is not self:
            pass
        if not self._needs:
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
