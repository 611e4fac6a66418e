"""Functions run in several gloo processes on this machine."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 100
"""Seconds until processes that wait for each other forever are killed."""


def in_processes(count: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return the results of a module's `function(rank, *args)` in `count` processes, by rank.

    Args:
        count: The number of processes.
        folder: Where they meet; another one for each call.
        function: It runs in an initialized process group.
        *args: Its further arguments; each process has a copy.

    Raises:
        torch.multiprocessing.ProcessRaisedException: A process raised.
        TimeoutError: They did not end.
    """
    # Imports take seconds; forks of one process that has them take none.
    mp.set_forkserver_preload([function.__module__])
    folder.mkdir()
    # Through a file: objects sent to a process directly share its memory.
    torch.save((function, args), folder / "call.pt")
    context = mp.start_processes(
        _run, (count, folder), count, join=False, start_method="forkserver"
    )
    assert context is not None
    end = time.monotonic() + TIMEOUT
    while not context.join(1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{function.__name__} did not end in {count} processes")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _run(rank: int, count: int, folder: Path) -> None:
    torch.set_num_threads(1)
    # As torchrun sets them, for accelerate.
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in own.items()}, MASTER_ADDR="localhost")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=TIMEOUT / 2),
    )
    function, args = torch.load(folder / "call.pt", weights_only=False)
    torch.save(function(rank, *args), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
