"""Examples drawn from a Trainer's own training data, as its own collator makes them."""

import copy
import logging
import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from fish_tuning.distributed import world
from fish_tuning.from_trainer.undisturbed import copied
from fish_tuning.scoring.inputs.batches import Batch, OneExample

logger = logging.getLogger(__name__)


class TrainerExamples:
    """Batches of examples drawn from a Trainer's training data.

    The draw, and whatever the data set and the collator draw, depends on the seed alone. Iterating
    sets the random number generators: do so where they are restored, as scoring does.

    Args:
        trainer: The Trainer.
        num_samples: How many examples to draw; all of them, in order, if None. Of a stream, which
            cannot be drawn from, these are the first ones.
        seed: Seed of the draw.
        one_at_a_time: Whether to collate each example by itself. Otherwise batches are as large as
            those that the Trainer trains on.
    """

    def __init__(
        self, trainer: Any, num_samples: int | None, seed: int, *, one_at_a_time: bool
    ) -> None:
        self._trainer, self._num_samples, self._seed = trainer, num_samples, seed
        self._one_at_a_time = one_at_a_time

    def __iter__(self) -> Iterator[Batch]:
        random.seed(self._seed)
        np.random.seed(self._seed % 2**32)
        # Of the processor alone: seeding accelerators that are not scored on would change them.
        torch.default_generator.manual_seed(self._seed)
        data, collate = self._data_and_collator()
        size = 1 if self._one_at_a_time else self._trainer.args.per_device_train_batch_size
        items = self._drawn(data)
        while rows := list(islice(items, size)):
            batch = collate(rows)
            yield OneExample(batch) if self._one_at_a_time else batch

    def _data_and_collator(self) -> tuple[Any, Callable[[list[Any]], Any]]:
        """The data set without unused columns, and the collator, as the Trainer's loader has them.

        Raises:
            ValueError: The Trainer's loader does not collate single examples of a data set.
        """
        trainer = self._trainer
        collator = trainer.data_collator
        trainer.data_collator = _with_own_state(collator)
        try:
            loader = trainer.get_train_dataloader()
        finally:
            trainer.data_collator = collator
        if not isinstance(loader, DataLoader) or loader.batch_sampler is None:
            raise ValueError(
                f"{type(trainer).__name__}.get_train_dataloader returns no DataLoader that makes "
                "batches of single examples: mask the model with get_fish_model(trainer.model, "
                "config, loader)"
            )
        data: Any = loader.dataset
        if isinstance(data, IterableDataset) and world()[1] > 1:
            data = trainer.train_dataset  # The loader's may be one process's part of it.
        return data, loader.collate_fn

    def _drawn(self, data: Any) -> Iterator[Any]:
        if not isinstance(data, IterableDataset):
            numbers = range(len(data))
            if self._num_samples is not None and self._num_samples < len(data):
                drawn = random.Random(self._seed).sample(numbers, self._num_samples)
                return (data[number] for number in drawn)
            return (data[number] for number in numbers)
        logger.warning(
            "The training data is a stream: its first %s examples are scored, not random ones",
            self._num_samples,
        )
        # A copy, because data sets note how far they have been read.
        data = copy.copy(data)
        items: Iterator[Any] = iter(data)
        if items is iter(data):
            raise ValueError(
                "the training data can be read only once, and scoring would take its first "
                "examples from training: give the Trainer a data set whose __iter__ starts over"
            )
        return items


def _with_own_state(collator: Any) -> Any:
    """A copy of a collator that shares everything with it but its generators and containers.

    Collators note in sets and lists what they have warned of.
    """
    collator = copy.copy(collator)
    for name, value in getattr(collator, "__dict__", {}).items():
        if isinstance(value, torch.Generator):
            setattr(collator, name, value.clone_state())
        elif isinstance(value, np.random.Generator):
            setattr(collator, name, copy.deepcopy(value))
        elif (own := copied(value)) is not value:
            setattr(collator, name, own)
    return collator
