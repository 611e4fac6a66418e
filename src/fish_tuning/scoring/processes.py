"""Several processes that score one calibration set together."""

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from fish_tuning.distributed import (
    check_equal_checksums,
    checksum,
    gather,
    sum_over_processes,
    world,
)
from fish_tuning.scoring.inputs.batches import Batch


class Processes:
    """Divides the batches of a calibration set among the processes, and adds up their sums.

    Every process iterates over all batches of the whole calibration set, so that each knows the
    number of every example and all recognize the same loss; only the scoring is divided. Without
    torch.distributed there is one process, and nothing is exchanged.

    Args:
        parameters: The scored parameters by name; they have to be equal in all processes.
        dividing: Whether the scoring is divided. Otherwise every process scores every batch.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, dividing: bool = True) -> None:
        self.rank, self.size = world()
        self._dividing = dividing
        self._parameters = parameters
        self._seen = 0

    @contextmanager
    def sharing(self, loader: Iterable[Batch]) -> Iterator[Iterator[tuple[bool, Batch]]]:
        """Yields all batches of the loader, each with a flag: whether this process scores it.

        If the block fails in one process, it fails in all, so that none of them waits forever.
        Inside the block the random number generators start in the states that they have in
        process 0, so that a loader that shuffles gives every process the same batches.

        Raises:
            ValueError: The parameters or the batches differ between the processes.
            RuntimeError: The block failed in another process, whose error is in the message, or
                another process has ended.
        """
        if self.size == 1:
            yield ((True, batch) for batch in loader)
            return
        self._start_alike()
        try:
            with _undivided(loader) as undivided:
                yield self._shares(undivided)
        except Exception as error:
            with suppress(RuntimeError):  # Others may have ended; the cause is this error.
                self._gather((f"{type(error).__name__}: {error}", self._seen))
            raise
        reports = self._gather((None, self._seen))
        for rank, (failure, _) in enumerate(reports):
            if failure is not None:
                raise RuntimeError(f"scoring failed in process {rank}: {failure}")
        if any(seen != self._seen for _, seen in reports):
            raise ValueError(
                "the processes were given different calibration batches: give each of them the "
                "whole calibration set in the same order; scoring divides it among them (a loader "
                "that accelerate or a DistributedSampler has divided is read undivided)"
            )

    def add(self, sums: Iterable[Tensor]) -> None:
        """Replaces the sums of each process by those over all processes, in place."""
        if self.size > 1 and self._dividing:
            sum_over_processes(sums)

    def _start_alike(self) -> None:
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()
        reports = self._gather((checksum(self._parameters.values()), states))
        check_equal_checksums(weights for weights, _ in reports)
        torch_state, random_state, numpy_state = reports[0][1]
        torch.set_rng_state(torch_state)
        random.setstate(random_state)
        np.random.set_state(numpy_state)

    def _shares(self, batches: Iterable[Batch]) -> Iterator[tuple[bool, Batch]]:
        for number, batch in enumerate(batches):
            values = batch.values() if isinstance(batch, Mapping) else batch
            self._seen = checksum([values] if isinstance(values, Tensor) else values, self._seen)
            yield not self._dividing or number % self.size == self.rank, batch

    def _gather(self, value: Any) -> list[Any]:
        return gather(value, next(iter(self._parameters.values())).device)


@contextmanager
def _undivided(loader: Any) -> Iterator[Iterable[Batch]]:
    """Yields a loader of the whole set, given one that may be divided among the processes.

    accelerate and DistributedSampler repeat or drop examples to make the shares equal. Undivided,
    they do neither. The attributes changed for that are restored afterwards.
    """
    if not isinstance(loader, DataLoader):
        yield loader
        return
    from accelerate.data_loader import DataLoaderDispatcher

    parts: list[Any] = [loader.dataset]
    sampler: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    while sampler is not None:
        parts.append(sampler)
        sampler = getattr(sampler, "batch_sampler", getattr(sampler, "sampler", None))
    changes = [(part, name, value) for part in parts for name, value in _one_process(part).items()]
    previous = [(part, name, getattr(part, name)) for part, name, _ in changes]
    for part, name, value in changes:
        setattr(part, name, value)
    try:
        # In a dispatcher, process 0 sends each process a share of what the base loader gives.
        yield loader.base_dataloader if isinstance(loader, DataLoaderDispatcher) else loader
    finally:
        for part, name, value in previous:
            setattr(part, name, value)


def _one_process(part: Any) -> dict[str, Any]:
    """The attributes that make a part of a loader serve a single process."""
    from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard

    if isinstance(part, BatchSamplerShard):
        return {"num_processes": 1, "process_index": 0, "even_batches": False}
    if isinstance(part, IterableDatasetShard):
        # It yields single examples, but pads or drops what it takes to be an incomplete batch.
        return {"num_processes": 1, "process_index": 0, "batch_size": 1}
    if isinstance(part, DistributedSampler):
        data: Any = part.dataset
        return {"num_replicas": 1, "rank": 0, "num_samples": len(data), "total_size": len(data)}
    return {}
