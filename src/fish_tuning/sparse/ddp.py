"""What DistributedDataParallel leaves alone of a masked model: it would broadcast all buffers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

_IGNORED = "_ddp_params_and_buffers_to_ignore"
"""Where DistributedDataParallel looks for the names of what it leaves alone."""


def ignore(root: nn.Module, names: Iterable[str]) -> set[str]:
    """Have it leave tensors of these names alone; return those that it did not before."""
    before = getattr(root, _IGNORED, [])
    new = set(names).difference(before)
    setattr(root, _IGNORED, [*before, *sorted(new)])
    return new


def stop_ignoring(root: nn.Module, names: set[str]) -> None:
    """Have it treat tensors of these names like all others."""
    setattr(root, _IGNORED, [name for name in getattr(root, _IGNORED, []) if name not in names])
