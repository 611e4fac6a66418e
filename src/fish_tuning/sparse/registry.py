"""Which models are masked, and where the state of their masks is found."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from fish_tuning.sparse.state import MaskState

STATE = "_fish_mask"
"""Attribute of a masked model that holds its state."""

_live: weakref.WeakSet[MaskState] = weakref.WeakSet()


def remember(state: MaskState) -> None:
    """Count a state among those of masked models."""
    _live.add(state)


def forget(state: MaskState) -> None:
    """Count a state no longer: its model has no mask left."""
    _live.discard(state)


def states() -> list[MaskState]:
    """The states of all masked models."""
    return list(_live)


def state_of(model: nn.Module) -> MaskState | None:
    """The state of a masked model, which an engine or a compiler may have wrapped."""
    module: nn.Module | None = model
    while module is not None:
        state: MaskState | None = getattr(module, STATE, None)
        if state is not None:
            return state
        wrapped = (module._modules.get(n) for n in ("module", "_orig_mod"))
        module = next((inner for inner in wrapped if inner is not None), None)
    return None
