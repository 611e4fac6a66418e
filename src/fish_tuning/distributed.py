"""What the processes of torch.distributed compare and exchange."""

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """This process's rank and the number of processes; 0 and 1 without torch.distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def check_equal(tensors: Iterable[Tensor]) -> None:
    """Checks that all processes hold the same tensors. With several processes, all must call.

    Raises:
        ValueError: The tensors differ.
    """
    if world()[1] > 1:
        tensors = list(tensors)
        check_equal_checksums(gather(checksum(tensors), tensors[0].device))


def check_equal_checksums(checksums: Iterable[int]) -> None:
    """Checks the checksums of the weights of all processes, as `gather` returns them.

    Raises:
        ValueError: The checksums differ.
    """
    if len(set(checksums)) > 1:
        raise ValueError(
            "the processes hold different trainable weights or masks: set the same seed in all of "
            "them before the model and its adapter are made (torch.manual_seed), or load them "
            "from the same file"
        )


def checksum(values: Iterable[Any], start: int = 0) -> int:
    """The CRC-32 of the bytes of all tensors among the values, continued from `start`."""
    for value in values:
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1)
            start = zlib.crc32(flat.view(torch.uint8).numpy().data, start)
    return start


def gather(value: Any, device: torch.device, group: Any = None) -> list[Any]:
    """Collects one value from every process, in the order of their ranks.

    Args:
        value: This process's value; anything that can be pickled.
        device: Where the model is. NCCL sends from the current device, which is the first one
            unless another has been set.
        group: A process group of all processes; the default one if None.

    Raises:
        RuntimeError: Another process has ended or does not answer.
    """
    values: list[Any] = [None] * dist.get_world_size()
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_device, explaining_failure():
        dist.all_gather_object(values, value, group=group)
    return values


def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor by its sum over all processes, in place.

    Raises:
        RuntimeError: Another process has ended or does not answer.
    """
    with explaining_failure():
        for tensor in tensors:
            dist.all_reduce(tensor)


def any_process(value: bool, device: torch.device) -> bool:
    """Whether the value is true in any process. All processes have to call.

    Args:
        value: This process's value.
        device: As in `gather`.

    Raises:
        RuntimeError: Another process has ended or does not answer.
    """
    found = torch.tensor(value, dtype=torch.int32, device=device)
    with explaining_failure():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


@contextmanager
def explaining_failure() -> Iterator[None]:
    """Turns a failed exchange between the processes into an error that says what it means."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise RuntimeError(
            "another process has ended or does not answer: look at its output, and at what killed "
            f"it (often the system, when memory runs out). This process reports: {reason}"
        ) from error
