"""The lock on an output folder: one sweep at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from fish_tuning.experiments.errors import ConfigError

LOCK_FILE = ".lock"


@contextlib.contextmanager
def locked(output_dir: Path) -> Iterator[None]:
    """Keep other sweeps out of a folder. The system frees the lock if the process is killed.

    Raises:
        ConfigError: Another process holds the lock.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output_dir / LOCK_FILE, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"training.output_dir: another process is running an experiment in "
            f"{str(output_dir)!r}; wait for it, or choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def check_unlocked(output_dir: Path) -> None:
    """Check, without creating anything, that no other sweep is running in a folder.

    Raises:
        ConfigError: Another process holds the lock.
    """
    if (output_dir / LOCK_FILE).is_file():
        with locked(output_dir):
            pass
