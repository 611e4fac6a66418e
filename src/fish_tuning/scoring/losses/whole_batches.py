"""Compares the loss recognized on one example with the model's own loss of whole batches."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fish_tuning.config import Estimator, TokenReduction
from fish_tuning.scoring.inputs.batches import IGNORED, Batch, batch_size, described, take
from fish_tuning.scoring.inputs.forward import Forward
from fish_tuning.scoring.inputs.labels import has_many_labels, is_usual, kind_of, labels_of
from fish_tuning.scoring.inputs.outputs import logits_of, loss_of
from fish_tuning.scoring.losses.checks import check_adds_up, check_alone, check_own_loss
from fish_tuning.scoring.losses.likelihood import Likelihood, Tokens
from fish_tuning.scoring.losses.recognition import explains, rounding

LARGE_LOGITS = 2**22
"""Most logits that are compared together where two examples suffice."""


class OwnLossError(Exception):
    """A batch shows that the model's own loss is not the likelihood that one example suggested."""


class WholeBatches:
    """Which batches have been compared, and with what.

    Args:
        forward: Calls the model.
        estimator: As in `calculate_fisher_information`.
        reduction: The `token_reduction` of `calculate_fisher_information`.
    """

    def __init__(self, forward: Forward, estimator: Estimator, reduction: TokenReduction) -> None:
        self._forward, self._options = forward, (estimator, reduction)
        self._alone: tuple[int, float] | None = None
        self._classes = 0
        self._few_labels, self._scored_unchecked = False, False
        self._checked: set[frozenset[str]] = set()

    def note_alone(self, number: int, own: Tensor | None, logits: Tensor, labels: Tensor) -> None:
        """Notes the example by which the loss is recognized.

        Args:
            number: Its number in the calibration set.
            own: The model's own loss of it.
            logits: Its logits.
            labels: Its labels.
        """
        self._alone = None if own is None else (number, float(own.detach()))
        self._classes = logits.shape[-1]
        self._few_labels = int((labels != IGNORED).sum()) <= 2

    def wants_own_loss(self, batch: Batch) -> bool:
        """Whether to compare a batch with the model's own loss."""
        if self._is_always_compared(batch):
            return True
        return batch_size(batch) > 1 and kind_of(batch) not in self._checked

    def most_at_once(self, batch: Batch) -> int:
        """How many examples to score together: all of them, or two that are compared first.

        The comparison keeps the logits beside what the model's own loss keeps of them. With a
        large vocabulary, that is more for a whole batch than a training step needs.
        """
        size = batch_size(batch)
        if self._is_always_compared(batch) or not self.wants_own_loss(batch):
            return size
        return 2 if self._classes * labels_of(batch).numel() > LARGE_LOGITS else size

    def compare(
        self,
        likelihood: Likelihood,
        batch: Batch,
        numbers: Sequence[int],
        outputs: Any,
        *,
        with_own: bool,
    ) -> None:
        """Compares the recognized loss with that of a batch, and of one example alone.

        Args:
            likelihood: The recognized loss.
            batch: The batch.
            numbers: The numbers of its examples in the calibration set.
            outputs: What the model returns for it.
            with_own: Whether this includes the model's own loss.

        Raises:
            OwnLossError: The batch has another loss.
            ValueError: The loss of an example changes with the batch that it is in.
        """
        logits, labels = logits_of(outputs), labels_of(batch)
        if with_own:
            self._compare_with_own(likelihood, batch, numbers, logits, loss_of(outputs))
        self._scored_unchecked |= not with_own
        if self._alone is not None and self._alone[0] in numbers and len(numbers) > 1:
            number, alone = self._alone
            if isinstance(likelihood, Tokens):
                likelihood = replace(likelihood, reduction="mean")
            with torch.no_grad():
                within = likelihood.losses(logits, labels)[list(numbers).index(number)]
            check_alone(number, alone, float(within), rounding(self._forward.base))

    def compare_sum(self, batch: Batch, losses: Sequence[Tensor]) -> None:
        """Compares losses of single examples with the loss that their batch has as a whole.

        Args:
            batch: The batch.
            losses: The loss of each example, taken alone.

        Raises:
            ValueError: They do not add up: no example has a loss of its own.
        """
        if len(losses) < 2 or not self.wants_own_loss(batch):
            return
        with torch.no_grad():
            own = loss_of(self._forward(batch, with_labels=True))
        if own is None or bool(own.isnan().any()):
            return  # Nothing to compare with: no example has a label.
        alone = torch.stack([loss.detach().reshape(()) for loss in losses])
        check_adds_up(alone, labels_of(batch), own.mean(), rounding(self._forward.base))
        self._checked.add(kind_of(batch))

    def _is_always_compared(self, batch: Batch) -> bool:
        """Whether no batch of a kind speaks for the others.

        A later batch may be the first with a rare class, token or outlier that has a weight. Only
        where transformers computes the loss of labels of tokens, another cross-entropy over the
        vocabulary, the first batch with the same entries is enough.
        """
        return self._forward.has_own_loss or not (has_many_labels(batch) and is_usual(batch))

    def _compare_with_own(
        self,
        likelihood: Likelihood,
        batch: Batch,
        numbers: Sequence[int],
        logits: Tensor,
        own: Tensor | None,
    ) -> None:
        if own is not None and bool(own.isnan().any()):
            return  # Nothing to compare with: no example has a label.
        if own is not None:
            labels = labels_of(batch)
            if not (
                explains(likelihood, logits, labels, own.mean())
                and self._explains_alone(likelihood, batch, logits, labels)
            ):
                shapes = tuple(logits.shape), tuple(labels.shape)
                check_own_loss(own, *self._options, *shapes)
                if self._scored_unchecked:
                    raise ValueError(
                        f"the model's own loss of examples {numbers[0]} to {numbers[-1]} is not "
                        "the likelihood by which earlier ones were scored: put a batch with these "
                        f"entries ({described(batch)}) first, or pass a loss_fn(outputs, batch)"
                    )
                raise OwnLossError(
                    "the model's own loss is not one of the known per-example losses"
                )
        if len(numbers) > 1:
            self._checked.add(kind_of(batch))

    def _explains_alone(
        self, likelihood: Likelihood, batch: Batch, logits: Tensor, labels: Tensor
    ) -> bool:
        """Whether an example of several labels alone has the mean over them, and not the sum."""
        counts = likelihood.counts(logits, labels)
        undecided = self._few_labels and isinstance(likelihood, Tokens)
        if not undecided or len(counts) == 1 or float(counts.max()) < 2:
            return True
        self._few_labels = False
        row = int(counts.argmax())
        one = take(batch, slice(row, row + 1))
        with torch.no_grad():
            outputs = self._forward(one, with_labels=True)
        own = loss_of(outputs)
        return own is None or explains(likelihood, logits_of(outputs), labels_of(one), own.mean())
