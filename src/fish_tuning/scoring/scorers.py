"""Sums of per-example gradients over batches: in one pass, one by one, or in halves of a batch."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fish_tuning.per_example.gradients import Added, PerExampleGradients
from fish_tuning.per_example.memory import is_out_of_memory
from fish_tuning.per_example.reduction import Reduction
from fish_tuning.per_example.sources import NoRuleError
from fish_tuning.scoring.batches import Batch, batch_size, take
from fish_tuning.scoring.objective import Objective

logger = logging.getLogger(__name__)


class Sums:
    """Adds parts of batches to a scorer's sums: smaller ones once memory did not suffice.

    Args:
        scorer: What adds a part that fits.
        divisible: Whether a part may be divided.
    """

    def __init__(self, scorer: OnePass | OneByOne, divisible: bool) -> None:
        self.scorer = scorer
        self._divisible = divisible
        self._most: float = float("inf")

    def add(self, batch: Batch, numbers: Sequence[int], added: Added | None = None) -> None:
        """Adds a part, whole or in halves.

        Args:
            batch: Examples.
            numbers: Their numbers in the calibration set.
            added: What an attempt that failed has added of them already.

        Raises:
            torch.OutOfMemoryError: Memory does not suffice for one example.
        """
        added = Counter() if added is None else added
        if len(numbers) <= self._most and self._fits(batch, numbers, added):
            return
        middle = (len(numbers) + 1) // 2
        for rows in (slice(0, middle), slice(middle, len(numbers))):
            of_half = {key: min(max(n - rows.start, 0), middle) for key, n in added.items()}
            self.add(take(batch, rows), numbers[rows], Counter(of_half))

    def _fits(self, batch: Batch, numbers: Sequence[int], added: Added) -> bool:
        """Adds a part unless memory does not suffice; `added` says how far it came then."""
        try:
            self._add(batch, numbers, added)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            said = str(error).partition("\n")[0]
            if len(numbers) == 1 or not self._divisible:
                which = f"calibration example {numbers[0]} alone"
                if len(numbers) > 1:
                    which = f"{len(numbers)} calibration examples at a time, as a loss_fn gets them"
                raise torch.OutOfMemoryError(
                    f"memory does not suffice to score {which}: shorten the examples, make the "
                    "batches smaller, score fewer parameters, or free memory that others hold "
                    f"({said})"
                ) from error
            self._most = (len(numbers) + 1) // 2
            logger.warning(
                "Memory does not suffice for %d examples at a time: scoring goes on with %d (%s)",
                len(numbers),
                self._most,
                said,
            )
        else:
            return True
        # Only now: the error held the frames of the failed attempt, and with them its tensors.
        gc.collect()
        return False

    def _add(self, batch: Batch, numbers: Sequence[int], added: Added) -> None:
        while True:
            try:
                return self.scorer.add(batch, numbers, added)
            except NoRuleError as reason:
                self.scorer = self.scorer.otherwise(reason)


class OnePass:
    """One backward pass a batch."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        objective: Objective,
        reduction: Reduction,
        gradients: PerExampleGradients,
    ) -> None:
        self.parameters, self.objective, self.reduction = parameters, objective, reduction
        self.gradients, self.sums = gradients, gradients.sums

    def add(self, batch: Batch, numbers: Sequence[int], added: Added) -> None:
        """Adds what `added` does not have yet, and enters it there."""
        with self.gradients.watching(batch_size(batch), added):
            losses = self.objective(batch, numbers)
            for left, loss in zip(reversed(range(len(losses))), losses, strict=True):
                self.gradients.backward(loss, retain_graph=left > 0)

    def otherwise(self, reason: NoRuleError) -> OnePass | OneByOne:
        """What goes on where gradients did not hold."""
        if self.gradients.recompute(reason):
            return self
        return _one_by_one(self.parameters, self.objective, self.reduction, reason, self.sums)


class OneByOne:
    """One backward pass an example: always right, and slower."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        objective: Objective,
        reduction: Reduction,
        sums: dict[str, Tensor] | None = None,
    ) -> None:
        self.parameters, self.objective, self.reduction = parameters, objective, reduction
        self.sums = {n: reduction.zeros(p) for n, p in parameters.items()} if sums is None else sums

    def add(self, batch: Batch, numbers: Sequence[int], added: Added) -> None:
        """Adds what `added` does not have yet, and enters it there."""
        for i, number in enumerate(numbers):
            losses = self.objective(take(batch, slice(i, i + 1)), [number])
            for j, loss in enumerate(losses):
                gradients = torch.autograd.grad(
                    loss.sum(),
                    [*self.parameters.values()],
                    retain_graph=j + 1 < len(losses),
                    allow_unused=True,
                )
                for (name, total), gradient in zip(self.sums.items(), gradients, strict=True):
                    if gradient is not None and added[name, j] <= i:
                        # A copy: autograd gives parameters that are added one gradient.
                        one = gradient.to(total.dtype, copy=True).unsqueeze(0)
                        self.reduction.add(total, one)
                        added[name, j] = i + 1

    def otherwise(self, reason: NoRuleError) -> OneByOne:
        """Itself: no rule is needed."""
        return self


def scorer_for(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    objective: Objective,
    reduction: Reduction,
    batch: Batch,
) -> OnePass | OneByOne:
    """Looks at one example: which loss it has, and whether one pass a batch will do."""
    try:
        gradients = PerExampleGradients(model, parameters, reduction)
    except NoRuleError as error:
        objective.recognise(batch)
        return _one_by_one(parameters, objective, reduction, error)
    while True:
        try:
            with gradients.checking_batch_axis():
                objective.recognise(batch)
            break
        except NoRuleError as error:
            if not gradients.recompute(error):
                return _one_by_one(parameters, objective, reduction, error)
    if not objective.by_example:
        return _one_by_one(
            parameters, objective, reduction, "the model's loss is none of those known by example"
        )
    return OnePass(parameters, objective, reduction, gradients)


def _one_by_one(
    parameters: dict[str, nn.Parameter],
    objective: Objective,
    reduction: Reduction,
    reason: object,
    sums: dict[str, Tensor] | None = None,
) -> OneByOne:
    logger.warning("Scoring one example at a time, which is slower: %s", reason)
    return OneByOne(parameters, objective, reduction, sums)
