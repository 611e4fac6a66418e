"""Several processes that carry out one sweep: one acts for all, and all learn of failures."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch.distributed as dist

from fish_tuning.distributed import world

T = TypeVar("T")

PATIENCE = timedelta(seconds=60)
"""How long a process whose run failed waits for the others to fail too."""


def count() -> int:
    """The number of processes; 1 without torch.distributed."""
    return world()[1]


def rank() -> int:
    """The number of this process among them, from 0."""
    return world()[0]


def is_main() -> bool:
    """Whether this is the process that writes files, holds the lock and prints."""
    return rank() == 0


def in_main(make: Callable[[], T]) -> T:
    """Call a function in the main process alone. Every process must make this call.

    Args:
        make: The function; its result must be picklable.

    Returns:
        Its result, in every process.

    Raises:
        Exception: Its exception, in every process.
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


def gather(value: T) -> list[T]:
    """Return every process's value, in the order of their ranks. Every process must call this.

    Args:
        value: This process's own, which must be picklable.
    """
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value, group=_groups()[0])
    return values


def agree_on(error: Exception | None) -> Exception | None:
    """Tell all processes whether one of them failed. Every process must make this call.

    Args:
        error: The exception raised in this process, if any.

    Returns:
        This process's exception, or else one that names the first process that failed; None if
        none failed.

    Raises:
        Exception: This process's exception, if the others do not answer. They are waiting for this
            process in the middle of a step. It must end, so that the launcher ends them.
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
    """Two groups besides the one that trains. On gloo, they can send objects from any device.

    In the first, processes wait for the main one's work, however long it takes. In the second, they
    meet when a run ends. It times out after a minute: the processes have just saved together, so a
    longer wait means that one of them is stuck.
    """
    return dist.new_group(backend="gloo"), dist.new_group(backend="gloo", timeout=PATIENCE)
