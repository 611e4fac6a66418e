"""Several processes of torch.distributed: one calibration set and one model, shared work."""

from __future__ import annotations

import functools
import random
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

if TYPE_CHECKING:
    from fish_tuning.scoring.batches import Batch


class Processes:
    """The processes that score together, each the batches whose turn is its own.

    All of them iterate over the same batches of the whole calibration set, so that each knows
    the number of every example and all recognise the same loss; only the sums are divided.
    Without torch.distributed there is one process, and nothing is exchanged.

    Args:
        parameters: What is scored, by name; it has to be equal in all processes.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        several = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if several else 0
        self.size = dist.get_world_size() if several else 1
        self._parameters = parameters
        self._seen = 0

    @contextmanager
    def sharing(self, loader: Iterable[Batch]) -> Iterator[Iterator[tuple[bool, Batch]]]:
        """Gives all batches of the loader, each with whether it is this process's to score.

        The block fails in all processes if it fails in one, instead of leaving them waiting.
        Inside it the random number generators start with the states that they have in process 0:
        a loader that shuffles gives every process the same batches.

        Raises:
            ValueError: The parameters differ between the processes, or the batches do.
            RuntimeError: The block failed in another process; the message has its error. Or
                another process has ended.
        """
        if self.size == 1:
            yield ((True, batch) for batch in loader)
            return
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()
        reports = self._gather((checksum(self._parameters.values()), states))
        _check_equal([weights for weights, _ in reports])
        torch_state, random_state, numpy_state = reports[0][1]
        torch.set_rng_state(torch_state)
        random.setstate(random_state)
        np.random.set_state(numpy_state)
        try:
            with _undivided(loader) as whole:
                yield self._shares(whole)
        except Exception as error:
            with suppress(RuntimeError):  # Others may have ended; this error is the cause here.
                self._gather((f"{type(error).__name__}: {error}", self._seen))
            raise
        reports = self._gather((None, self._seen))
        for rank, (failure, _) in enumerate(reports):
            if failure is not None:
                raise RuntimeError(f"scoring failed in process {rank}: {failure}")
        if any(seen != self._seen for _, seen in reports):
            raise ValueError(
                "the processes were given different calibration batches: give each of them the "
                "whole calibration set in the same order, scoring divides it among them (a loader "
                "that accelerate or a DistributedSampler has divided is put together again)"
            )

    def _shares(self, batches: Iterable[Batch]) -> Iterator[tuple[bool, Batch]]:
        for number, batch in enumerate(batches):
            values = batch.values() if isinstance(batch, Mapping) else batch
            self._seen = checksum([values] if isinstance(values, Tensor) else values, self._seen)
            yield number % self.size == self.rank, batch

    def add(self, sums: Iterable[Tensor]) -> None:
        """Replaces the sums of each process by those over all, in place: the same everywhere."""
        if self.size > 1:
            with _all_answering():
                for total in sums:
                    dist.all_reduce(total)

    def _gather(self, value: Any) -> list[Any]:
        return _gather(value, next(iter(self._parameters.values())).device)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that DistributedDataParallel has wrapped, or the model itself.

    Raises:
        ValueError: DeepSpeed has the parameters, or an engine has divided them among the processes.
    """
    model = model.module if isinstance(model, DistributedDataParallel) else model
    if (engine := _sharding_engine(model)) is not None:
        raise ValueError(
            f"{engine} has divided the model's parameters among the processes: score and mask the "
            "model before it is sharded"
        )
    if _held_by_deepspeed(model):
        raise ValueError(
            "DeepSpeed has made its optimizer of the model's parameters: score and mask the model "
            "before it is prepared"
        )
    return model


def check_maskable(model: nn.Module) -> None:
    """Raises ValueError for a model that an engine has wrapped or sharded already."""
    if unwrapped(model) is not model:
        raise ValueError(
            "DistributedDataParallel knows only the parameters that it found when it wrapped the "
            "model: mask the model first, then wrap it"
        )


def check_equal(tensors: Iterable[Tensor]) -> None:
    """Compares tensors between the processes, if there are several; all have to call.

    Raises:
        ValueError: They differ.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        tensors = list(tensors)
        _check_equal(_gather(checksum(tensors), tensors[0].device))


def whole(values: Tensor, size: int) -> Tensor:
    """All `size` entries of a trainable vector, of which `fully_shard` leaves each process a part.

    Where it has, all processes have to call.

    Raises:
        RuntimeError: Another engine has left a part only.
    """
    if hasattr(values, "full_tensor"):
        values = values.full_tensor()
    if values.numel() != size:
        raise RuntimeError(
            f"this process holds {values.numel()} of {size} trained values: a masked model trains "
            "under DistributedDataParallel, fully_shard (FSDP2) and DeepSpeed ZeRO-1 or ZeRO-2, "
            "not under FullyShardedDataParallel (FSDP1) or DeepSpeed ZeRO-3"
        )
    return values


def after_deepspeed_steps(report: Callable[[nn.Module], None]) -> None:
    """Has every step of a DeepSpeed engine reported, with its model, once DeepSpeed is imported.

    ZeRO steps copies of its own inside an ordinary optimizer, whose hooks see nothing of the model.
    The parameters get their new values later, in the engine's step, which has no hooks.
    """
    if (engine := _deepspeed_engine()) is not None:
        _report_steps(engine, report)


def assign(values: Any, part: slice, new: Tensor) -> None:
    """values[part] = new, also for a vector that `fully_shard` has divided."""
    if not hasattr(values, "full_tensor"):
        values[part] = new
        return
    from torch.distributed.tensor import distribute_tensor

    full = values.full_tensor()
    full[part] = new
    values.copy_(distribute_tensor(full, values.device_mesh, values.placements))


def checksum(values: Iterable[Any], start: int = 0) -> int:
    """The CRC-32 of the bytes of the tensors among the values, continued from `start`."""
    for value in values:
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1)
            start = zlib.crc32(flat.view(torch.uint8).numpy().data, start)
    return start


def _check_equal(checksums: list[int]) -> None:
    if len(set(checksums)) > 1:
        raise ValueError(
            "the processes hold different trainable weights or masks: set the same seed in all of "
            "them before the model and its adapter are made (torch.manual_seed), or load them "
            "from the same file"
        )


def _gather(value: Any, device: torch.device) -> list[Any]:
    """The values of all processes, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    # NCCL sends from the current device, which is the first one wherever nobody has set it.
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with on_device, _all_answering():
        dist.all_gather_object(values, value)
    return values


@contextmanager
def _all_answering() -> Iterator[None]:
    """Says what it means when an exchange between the processes fails."""
    try:
        yield
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        raise RuntimeError(
            "another process has ended or does not answer: look at what it said, and at what "
            f"killed it (often the system, out of memory). Here: {said}"
        ) from error


def _deepspeed_engine() -> Any:
    """DeepSpeed's class of engines if the program has imported it: it takes seconds to import."""
    return getattr(sys.modules.get("deepspeed.runtime.engine"), "DeepSpeedEngine", None)


@functools.cache
def _report_steps(engine: Any, report: Callable[[nn.Module], None]) -> None:
    step = engine.step

    @functools.wraps(step)
    def reported(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = step(self, *args, **kwargs)
        report(self.module)
        return result

    engine.step = reported


def _held_by_deepspeed(model: nn.Module) -> bool:
    engine = _deepspeed_engine()
    if engine is None:
        return False
    # What ZeRO notes on a parameter: its place in the copies that are stepped.
    mapped = any(hasattr(parameter, "_hp_mapping") for parameter in model.parameters())
    return mapped or isinstance(model, engine)


def _sharding_engine(model: nn.Module) -> str | None:
    parameters = list(model.parameters())
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        return "DeepSpeed ZeRO-3"
    if dist.is_available() and dist.is_initialized():
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.tensor import DTensor

        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            return "FullyShardedDataParallel"
        if any(isinstance(parameter, DTensor) for parameter in parameters):
            return "fully_shard or tensor parallelism"
    return None


@contextmanager
def _undivided(loader: Any) -> Iterator[Iterable[Batch]]:
    """The loader of the whole set, given one that is divided among the processes.

    accelerate and DistributedSampler repeat examples where the parts would not be equal, or drop
    some. Undivided they do neither. What is changed for that is given back.
    """
    if not isinstance(loader, DataLoader):
        yield loader
        return
    from accelerate.data_loader import (
        BatchSamplerShard,
        DataLoaderDispatcher,
        IterableDatasetShard,
    )

    parts: list[Any] = [loader.dataset]
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    while sampler is not None:
        parts.append(sampler)
        sampler = getattr(sampler, "batch_sampler", getattr(sampler, "sampler", None))
    borrowed = []
    for part in parts:
        whole: dict[str, Any] = {}
        if isinstance(part, BatchSamplerShard):
            whole = {"num_processes": 1, "process_index": 0, "even_batches": False}
        elif isinstance(part, IterableDatasetShard):
            # It gives single examples; only what it takes for a batch is filled up or dropped.
            whole = {"num_processes": 1, "process_index": 0, "batch_size": 1}
        elif isinstance(part, DistributedSampler):
            data: Any = part.dataset
            total = len(data)
            whole = {"num_replicas": 1, "rank": 0, "num_samples": total, "total_size": total}
        borrowed.append((part, {name: getattr(part, name) for name in whole}))
        for name, value in whole.items():
            setattr(part, name, value)
    try:
        # A dispatcher's process 0 sends each process a part of what its own loader gives.
        yield loader.base_dataloader if isinstance(loader, DataLoaderDispatcher) else loader
    finally:
        for part, values in borrowed:
            for name, value in values.items():
                setattr(part, name, value)
