"""Ways to add the scores of a batch to sums: in one pass, one by one, or in halves."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence

import torch

from fish_tuning.per_example.errors import OnePassError
from fish_tuning.per_example.gradients import PerExampleGradients
from fish_tuning.per_example.memory import is_out_of_memory
from fish_tuning.per_example.sums import GradientSums, Progress
from fish_tuning.scoring.inputs.batches import Batch, batch_size, take
from fish_tuning.scoring.losses.one_example import check_division
from fish_tuning.scoring.losses.whole_batches import OwnLossError
from fish_tuning.scoring.objective import Objective

logger = logging.getLogger(__name__)


class BatchScorer:
    """Adds batches to sums, and divides them in halves once memory runs out.

    The first batch decides which loss its examples have, and whether one backward pass per batch
    gives their gradients.

    Args:
        objective: The losses whose gradients are scored.
        sums: Where to add the gradients.
        batch: A batch with a label.
        numbers: The numbers of its examples in the calibration set.
        agreed: Given why memory ran out, or None, returns why it did in any process.
    """

    def __init__(
        self,
        objective: Objective,
        sums: GradientSums,
        batch: Batch,
        numbers: Sequence[int],
        agreed: Callable[[str | None], str | None],
    ) -> None:
        self._scorer = _scorer_for(objective, sums, batch, numbers)
        self._objective = objective
        self._agreed = agreed
        self._most: float = float("inf")

    def add(self, batch: Batch, numbers: Sequence[int], progress: Progress | None = None) -> None:
        """Adds a batch.

        Args:
            batch: The examples.
            numbers: Their numbers in the calibration set.
            progress: What a failed attempt has already added of them.

        Raises:
            torch.OutOfMemoryError: A single example does not fit in memory.
        """
        progress = Progress() if progress is None else progress
        size = len(numbers)
        one_pass = isinstance(self._scorer, OnePass)
        first = self._objective.most_at_once(batch) if one_pass else size
        if first == size:
            if size <= self._most and self._fits(batch, numbers, progress):
                return
            first = (size + 1) // 2
        for part in (slice(0, first), slice(first, size)):
            self.add(take(batch, part), numbers[part], progress.within(part))

    def _fits(self, batch: Batch, numbers: Sequence[int], progress: Progress) -> bool:
        """Adds a batch and returns True, or returns False if memory runs out."""
        reason, cause = None, None
        try:
            self._attempt(batch, numbers, progress)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
            # Without the failed attempt's frames, which keep their tensors alive.
            cause = error.with_traceback(None)
        if (reason := self._agreed(reason)) is None:
            return True
        if len(numbers) == 1 or not self._objective.divisible:
            raise torch.OutOfMemoryError(_no_way_to_divide(numbers, reason)) from cause
        self._most = (len(numbers) + 1) // 2
        logger.warning(
            "Memory does not suffice for %d examples at a time: scoring continues with %d (%s)",
            len(numbers),
            self._most,
            reason,
        )
        del cause
        gc.collect()
        return False

    def _attempt(self, batch: Batch, numbers: Sequence[int], progress: Progress) -> None:
        while True:
            try:
                return self._scorer.add(batch, numbers, progress)
            except OwnLossError as error:
                self._scorer = self._scorer.with_own_loss(error)
            except OnePassError as error:
                assert isinstance(self._scorer, OnePass)
                self._scorer = self._scorer.after(error)
            gc.collect()  # The failed attempt's graph, which its traceback keeps in a cycle.


class OnePass:
    """One backward pass per batch.

    Args:
        gradients: Adds the gradients to the sums.
        objective: The losses.
        sums: The sums.
    """

    def __init__(
        self, gradients: PerExampleGradients, objective: Objective, sums: GradientSums
    ) -> None:
        self._gradients, self._objective, self._sums = gradients, objective, sums

    def add(self, batch: Batch, numbers: Sequence[int], progress: Progress) -> None:
        """Adds what the sums do not have yet, and records it in `progress`."""
        with self._gradients.watching(batch_size(batch), progress):
            losses = self._objective(batch, numbers)
            for left, loss in zip(reversed(range(len(losses))), losses, strict=True):
                self._gradients.backward(loss, retain_graph=left > 0)

    def after(self, error: OnePassError) -> OnePass | OneByOne:
        """The scorer to continue with after this one has failed."""
        if self._gradients.recompute(error):
            return self
        return _one_by_one(self._objective, self._sums, error)

    def with_own_loss(self, error: OwnLossError) -> OneByOne:
        """The scorer to continue with if only the model knows its loss."""
        return _one_by_one(self._objective, self._sums, error)


class OneByOne:
    """One backward pass per example: right for every model, and slower.

    Args:
        objective: The losses.
        sums: The sums.
    """

    def __init__(self, objective: Objective, sums: GradientSums) -> None:
        self._objective, self._sums = objective, sums

    def add(self, batch: Batch, numbers: Sequence[int], progress: Progress) -> None:
        """Adds what the sums do not have yet, and records it in `progress`."""
        parameters = self._sums.parameters
        self._objective.check_batch(batch, numbers)
        alone = []
        for i, number in enumerate(numbers):
            one = take(batch, slice(i, i + 1))
            if not self._objective.by_example and not self._objective.has_label(one):
                # The model's own loss would be NaN.
                alone.append(next(iter(parameters.values())).new_zeros(()))
                continue
            try:
                losses = self._objective(one, [number])
            except (LookupError, RuntimeError) as error:
                check_division(error, self._objective.forward, batch)
                raise
            alone.append(losses[0].detach())
            for j, loss in enumerate(losses):
                gradients = self._sums.gradients(loss.sum(), retain_graph=j + 1 < len(losses))
                done = progress.of_loss(j)
                for name, gradient in gradients.items():
                    if done[name] <= i:
                        dtype = self._sums.totals[name].dtype
                        self._sums.add(name, gradient.to(dtype).unsqueeze(0))
                        done[name] = i + 1
        self._objective.check_together(batch, alone)

    def with_own_loss(self, error: OwnLossError) -> OneByOne:
        """The scorer to continue with if only the model knows its loss."""
        return self


def _scorer_for(
    objective: Objective, sums: GradientSums, batch: Batch, numbers: Sequence[int]
) -> OnePass | OneByOne:
    """Recognizes the loss of one example, and chooses the scorer."""
    if objective.one_at_a_time:
        return OneByOne(objective, sums)
    try:
        gradients = PerExampleGradients(objective.forward.model, sums)
    except OnePassError as error:
        objective.recognize(batch, numbers)
        return _one_by_one(objective, sums, error)
    while True:
        try:
            with gradients.checking_batch_axis():
                objective.recognize(batch, numbers)
            break
        except OnePassError as error:
            if not gradients.recompute(error):
                return _one_by_one(objective, sums, error)
    if not objective.by_example:
        return _one_by_one(
            objective, sums, "the model's own loss is not one of the known per-example losses"
        )
    return OnePass(gradients, objective, sums)


def _one_by_one(objective: Objective, sums: GradientSums, reason: object) -> OneByOne:
    logger.warning("Scoring one example at a time, which is slower: %s", reason)
    return OneByOne(objective, sums)


def _no_way_to_divide(numbers: Sequence[int], reason: str) -> str:
    which = f"calibration example {numbers[0]} alone"
    if len(numbers) > 1:
        which = f"{len(numbers)} calibration examples at a time, as a loss_fn gets them"
    return (
        f"memory does not suffice to score {which}: shorten the examples, make the batches "
        f"smaller, score fewer parameters, or free memory held by other programs ({reason})"
    )
