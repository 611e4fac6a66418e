"""Several processes that score one calibration set together."""

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
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

PATIENCE = timedelta(seconds=40)
"""How long a process waits for others that should be where it is."""

_END = object()
"""In the place of a batch, after the last one."""


class Processes:
    """Divides the batches of a calibration set among the processes, and adds up their sums.

    Every process iterates over all batches of the whole calibration set, so that each knows the
    number of every example and all recognize the same loss; only the scoring is divided. Without
    torch.distributed there is one process, and nothing is exchanged.

    If `fully_shard` has divided the model, every pass through it is one that all processes make
    together. Then every process scores every batch, and they agree on what happens next.

    Args:
        parameters: The scored parameters by name that every process holds as a whole; they have to
            be equal in all processes.
        device: Where the model is.
        dividing: Whether the scoring is divided. Otherwise every process scores every batch.
        together: Whether all processes have to pass through the model together.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        device: torch.device,
        *,
        dividing: bool = True,
        together: bool = False,
    ) -> None:
        self.rank, self.size = world()
        self._parameters, self._device = parameters, device
        self._dividing, self._together = dividing and not together, together and self.size > 1
        self._seen = 0
        self._group: Any = None
        self._told = False

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
        with self._with_own_group():
            try:
                with _undivided(loader) as undivided:
                    yield self._shares(undivided)
            except Exception as error:
                if not self._told:
                    with suppress(RuntimeError):  # Others may have ended; the cause is this error.
                        self._gather((_described(error), self._seen), self._group)
                raise
            self._compare(self._gather((None, self._seen), self._group))

    def add(self, sums: Iterable[Tensor]) -> None:
        """Replaces the sums of each process by those over all processes, in place."""
        if self.size > 1 and self._dividing:
            sum_over_processes(sums)

    def agreed(self, reason: str | None) -> str | None:
        """Why a batch did not fit in memory, if it did not in any process.

        Args:
            reason: Why it did not in this one, or None.

        Raises:
            RuntimeError: Another process failed for another reason.
        """
        if not self._together:
            return reason
        reports = self._gather((None, reason), self._group)
        self._raise_failure([failure for failure, _ in reports])
        return next((found for _, found in reports if found is not None), None)

    @contextmanager
    def _with_own_group(self) -> Iterator[None]:
        """Has a group for messages, beside the exchanges that the model makes.

        A process that fails within the model reports it here, and the others may be waiting for it
        there; it does not wait for them for long.
        """
        if not self._together:
            yield
            return
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        try:
            yield
        finally:
            dist.destroy_process_group(self._group)
            self._group = None

    def _start_alike(self) -> None:
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()
        reports = self._gather((checksum(self._parameters.values()), states))
        check_equal_checksums(weights for weights, _ in reports)
        torch_state, random_state, numpy_state = reports[0][1]
        torch.set_rng_state(torch_state)
        random.setstate(random_state)
        np.random.set_state(numpy_state)

    def _shares(self, batches: Iterable[Batch]) -> Iterator[tuple[bool, Batch]]:
        batches = self._fetched_together(batches) if self._together else map(self._noted, batches)
        for number, batch in enumerate(batches):
            yield not self._dividing or number % self.size == self.rank, batch

    def _fetched_together(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yields each batch once all processes have it."""
        batch: Any = None
        iterator: Any = None
        while True:
            error = None
            try:
                iterator = iter(batches) if iterator is None else iterator
                batch = next(iterator, _END)
            except Exception as failure:
                error = failure
            else:
                self._noted(() if batch is _END else batch)
            report = (error and _described(error), (self._seen, batch is _END))
            # With the patience of the model's own exchanges: a loader may take long.
            reports = self._gather(report)
            if error is not None:
                self._told = True
                raise error
            self._compare(reports)
            if batch is _END:
                return
            yield batch

    def _noted(self, batch: Batch) -> Batch:
        """A batch, once it is part of the checksum of all that have been seen."""
        values = batch.values() if isinstance(batch, Mapping) else batch
        self._seen = checksum([values] if isinstance(values, Tensor) else values, self._seen)
        return batch

    def _compare(self, reports: Sequence[tuple[str | None, Any]]) -> None:
        """Raises if a process failed, or if not all have seen the same batches."""
        self._raise_failure([failure for failure, _ in reports])
        if len({seen for _, seen in reports}) > 1:
            self._told = True
            raise ValueError(
                "the processes were given different calibration batches: give each of them the "
                "whole calibration set in the same order; scoring divides it among them (a loader "
                "that accelerate or a DistributedSampler has divided is read undivided)"
            )

    def _raise_failure(self, failures: Sequence[str | None]) -> None:
        for rank, failure in enumerate(failures):
            if failure is not None:
                self._told = True
                raise RuntimeError(f"scoring failed in process {rank}: {failure}")

    def _gather(self, value: Any, group: Any = None) -> list[Any]:
        return gather(value, self._device, group)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


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
