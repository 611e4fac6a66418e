"""Hooks that keep a masked model up to date: in forward passes and around optimizer steps."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from fish_tuning.masked_tensors.structure import entrances
from fish_tuning.sparse.optimizers import check_optimizer
from fish_tuning.sparse.registry import states
from fish_tuning.sparse.state import MaskState

logger = logging.getLogger(__name__)


def hook_forward(state: MaskState, root: nn.Module) -> None:
    """Hook the forward pass of a model, and of the models that PEFT has wrapped."""
    for module in entrances(root):
        before = functools.partial(_before_forward, state)
        after = functools.partial(_after_forward, state)
        state.uninstallers += [
            module.register_forward_pre_hook(before).remove,
            module.register_forward_hook(after, always_call=True).remove,
        ]


def _no_graph_of_its_own(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook that torch.compile makes part of a graph, or leaves alone.

    The hooks of a compiled model lie outside the graph of its forward pass, and torch.compile
    would make graphs of their own of them. Inside a larger compiled function they are part of its
    graph.
    """
    outside: Callable[..., None] = torch.compiler.disable(hook)
    torch.compiler.substitute_in_graph(outside)(hook)
    return outside


@_no_graph_of_its_own
def _before_forward(state: MaskState, module: nn.Module, args: Any) -> None:
    state.before_forward(module)


@_no_graph_of_its_own
def _after_forward(state: MaskState, module: nn.Module, args: Any, output: Any) -> None:
    outermost = not torch.compiler.is_compiling() and state.running == id(module)
    if outermost and sys.exc_info()[0] is not None:
        _explain_error(state)
    state.after_forward(module)


def _explain_error(state: MaskState) -> None:
    """Say why types may not fit: casting parameters one by one leaves masked tensors out."""
    groups = ((tensor.group, tensor.values) for tensor in state.tensors if tensor.is_split)
    if any(group is not None and values.dtype != group.storage.dtype for group, values in groups):
        logger.warning(
            "A forward pass of the masked model failed, in which the .data of parameters was cast: "
            "cast modules, as in layer.to(dtype), which casts masked tensors too"
        )


def _before_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for state in states():
        state.before_step()


def _after_optimizer_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if live := states():
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for state in live:
            state.after_step(stepped)


register_optimizer_step_pre_hook(check_optimizer)
register_optimizer_step_pre_hook(_before_optimizer_step)
register_optimizer_step_post_hook(_after_optimizer_step)
