"""Several processes that carry out one sweep: what one does for all, and what all know of each."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist

T = TypeVar("T")

PATIENCE = timedelta(seconds=60)
"""How long a process whose run has failed waits for the others to fail too."""


def count() -> int:
    """The number of processes; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes files, holds the lock and prints."""
    return count() == 1 or dist.get_rank() == 0


def in_main(make: Callable[[], T]) -> T:
    """Call a function in the main process alone; all have to call this.

    Args:
        make: It returns what can be pickled.

    Returns:
        What it has returned, in all processes.

    Raises:
        Exception: What it has raised, in all processes.
    """
    if count() == 1:
        return make()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = make()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, group=_groups()[0])
    value, failure = outcome
    if failure is not None:
        raise failure
    return cast(T, value)


def agree_on(error: Exception | None) -> Exception | None:
    """Tell all processes whether one of them failed; all have to call.

    Args:
        error: What was raised in this process.

    Returns:
        The error of this process or of the first one that has any; None if all went well.

    Raises:
        Exception: The error of this process, where the others do not answer. They wait for it in
            the middle of something: it has to end, so that its launcher ends them.
    """
    if count() == 1:
        return error
    reports: list[str | None] = [None] * count()
    own = None if error is None else f"{type(error).__name__}: {error}"
    try:
        dist.all_gather_object(reports, own, group=_groups()[1])
    except RuntimeError:
        if error is None:
            raise
        raise error from None
    if error is None:
        for rank, report in enumerate(reports):
            if report is not None:
                return RuntimeError(f"process {rank} failed: {report}")
    return error


def end() -> None:
    """Leave the group of processes, if there is one."""
    if count() > 1:
        _groups.cache_clear()
        dist.destroy_process_group()


@functools.cache
def _groups() -> tuple[Any, Any]:
    """Two groups beside the one that trains, which send objects from any device.

    In the first, processes wait for the main one's work. In the second, those that went well meet
    at once, as they have just saved together: who waits there for long waits for one that is
    stuck.
    """
    return dist.new_group(backend="gloo"), dist.new_group(backend="gloo", timeout=PATIENCE)
