"""The losses whose gradients are scored: a batch -> one value per example."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from fish_tuning.arguments import check_choice
from fish_tuning.config import Estimator, TokenReduction
from fish_tuning.scoring.cutting import Padding
from fish_tuning.scoring.inputs.batches import (
    IGNORED,
    Batch,
    OneExample,
    batch_size,
    described,
    take,
)
from fish_tuning.scoring.inputs.forward import Forward
from fish_tuning.scoring.inputs.labels import (
    has_classes,
    labels_of,
    most_labeled,
    predicted_from_text,
)
from fish_tuning.scoring.inputs.outputs import logits_of, loss_is_second, loss_of
from fish_tuning.scoring.losses.checks import (
    check_finite,
    check_independent,
    check_own_loss,
    check_shift,
    scalar,
)
from fish_tuning.scoring.losses.likelihood import (
    Likelihood,
    Tokens,
    expected_losses,
)
from fish_tuning.scoring.losses.one_example import check_labels, outputs_of_one
from fish_tuning.scoring.losses.own_loss import OwnLoss
from fish_tuning.scoring.losses.recognition import fitting
from fish_tuning.scoring.losses.whole_batches import OwnLossError, WholeBatches

LossFunction = Callable[[Any, Batch], Tensor]
"""(outputs of the model, batch) -> one loss per example, shape (b,)."""


@dataclass(frozen=True)
class ExampleLoss:
    """A loss that calls the model itself, with one example at a time.

    All processes score all examples, because the function may exchange numbers between them.

    Attributes:
        function: Takes the inputs of a `OneExample` and returns a scalar.
    """

    function: Callable[[Any], Tensor]


class Objective:
    """Turns a batch into its losses: what is scored is sum_j |gradient of loss_j|^power.

    `recognize` has to see a batch first. It decides where the losses come from: the caller's
    `loss_fn`, a likelihood that agrees with the model's own loss, or (then `by_example` is False)
    that loss itself, which is known only for one example at a time.

    Args:
        forward: Calls the model.
        power: 2 to score squared gradients, 1 for absolute ones.
        estimator: As in `calculate_fisher_information`.
        label_samples: As in `calculate_fisher_information`.
        token_reduction: As in `calculate_fisher_information`.
        loss_fn: As in `calculate_fisher_information`.
        seed: As in `calculate_fisher_information`.

    Raises:
        ValueError: An argument is out of range, or contradicts another.
    """

    def __init__(
        self,
        forward: Forward,
        power: int,
        *,
        estimator: Estimator,
        label_samples: int | None,
        token_reduction: TokenReduction,
        loss_fn: LossFunction | ExampleLoss | None,
        seed: int,
    ) -> None:
        check_choice("estimator", estimator, get_args(Estimator))
        check_choice("token_reduction", token_reduction, get_args(TokenReduction))
        if label_samples is not None and label_samples < 1:
            raise ValueError(f"label_samples={label_samples}: must be at least 1, or None")
        if loss_fn is not None and estimator == "true":
            raise ValueError(
                "estimator='true' needs the model's p(y | x), which a loss_fn does not give: use "
                "estimator='empirical', or leave loss_fn out"
            )
        if label_samples is not None and estimator == "empirical":
            raise ValueError(
                f"label_samples={label_samples}: labels are drawn only with estimator='true'"
            )
        self.forward, self.power = forward, power
        self.forward.predicts_first_token = loss_fn is not None
        self._estimator, self._label_samples, self._seed = estimator, label_samples, seed
        self._reduction, self._loss_fn = token_reduction, loss_fn
        self._likelihood: Likelihood | None = None
        self.padding = Padding(forward)
        self._whole_batches = WholeBatches(forward, estimator, token_reduction)
        self._is_independent = False

    @property
    def one_at_a_time(self) -> bool:
        """Whether the loss is only known for one example at a time, whatever the model does."""
        return isinstance(self._loss_fn, ExampleLoss)

    @property
    def by_example(self) -> bool:
        """Whether a batch of several examples has a loss for each."""
        return self._loss_fn is not None or self._likelihood is not None

    @property
    def divisible(self) -> bool:
        """Whether a batch may be scored in parts; a `loss_fn` always gets whole batches."""
        return self._loss_fn is None

    def most_at_once(self, batch: Batch) -> int:
        """How many examples of a batch to score together, see `WholeBatches.most_at_once`."""
        known = self._likelihood is not None
        return self._whole_batches.most_at_once(batch) if known else batch_size(batch)

    def read(self, value: Any) -> Batch:
        """What a loader yields as a batch, with its tensors on the model's device.

        Raises:
            ValueError: It is not certain what the items of the batch mean.
        """
        return self.forward.read(value, only_labels=self._loss_fn is None)

    def has_label(self, batch: Batch) -> bool:
        """Whether the batch has an example to recognize the loss by.

        An example without one has no loss and scores 0. A label of -100 is none, nor is that of a
        first token that nothing predicts.
        """
        labels = labels_of(batch)
        if self._loss_fn is not None or not has_classes(labels):
            return True
        labeled = labels != IGNORED
        if labels.dim() != 2 or bool(labeled[:, 1:].any()) or not bool(labeled.any()):
            return bool(labeled.any())
        own = self._own_loss(batch)
        return own is None or not bool(own.isnan().all())

    def recognize(self, batch: Batch, numbers: Sequence[int]) -> None:
        """Calls the model with one example and finds out how its loss is computed.

        What this example suggests is compared with the loss of whole batches later.

        Args:
            batch: A batch with a label.
            numbers: The numbers of its examples in the calibration set.

        Raises:
            ValueError: The outputs and the batch give no loss.
        """
        position = most_labeled(batch)
        one = take(batch, slice(position, position + 1))
        with_labels = self._loss_fn is None
        outputs = outputs_of_one(self.forward, one, batch, with_labels=with_labels)
        if self._loss_fn is not None:
            return
        own, logits, labels = loss_of(outputs), logits_of(outputs), labels_of(one)
        if labels is None and own is None:
            raise ValueError(
                f"the calibration batches have no labels ({described(batch)}): name the column "
                "'labels', or pass a loss_fn(outputs, batch)"
            )
        if own is not None:
            own = scalar(own)
            check_finite(own.reshape(1), [numbers[position]])
        shapes = _shape(logits), _shape(labels)
        after_logits = loss_is_second(outputs)
        if isinstance(labels, Tensor) and isinstance(logits, Tensor):
            self.forward.leave_labels_out_only_if_equal(one, logits)
            self._whole_batches.note_alone(numbers[position], own, logits, labels)
            kinds = fitting(logits, labels, own, labels_of(batch))
            check_shift(kinds, own, batch)
            if own is not None:
                comparison = OwnLoss(own, logits, labels, kinds)
                del outputs, logits
                kinds = comparison.agreeing()
            if kinds and isinstance(kinds[0], Tokens):
                kinds = [replace(kinds[0], reduction=self._reduction)]
            self._likelihood = kinds[0] if kinds else None
        if self._likelihood is None:
            self.forward.predicts_first_token = True
            options = self._estimator, self._reduction
            check_own_loss(own, *options, *shapes, certain=not after_logits)

    def check_batch(self, batch: Batch, numbers: Sequence[int]) -> None:
        """Compares the recognized loss of a batch that is scored one by one with the model's own.

        Raises:
            OwnLossError: The batch has another loss.
            ValueError: The loss of an example changes with the batch that it is in.
        """
        if self._likelihood is None or len(numbers) == 1:
            return
        if self._whole_batches.wants_own_loss(batch):
            with torch.no_grad():
                outputs = self.forward(batch, with_labels=True)
            self._compare(batch, numbers, outputs, with_own=True)

    def check_together(self, batch: Batch, losses: Sequence[Tensor]) -> None:
        """Compares losses of single examples with the loss that their batch has as a whole.

        Args:
            batch: The batch.
            losses: The loss of each example, taken alone.

        Raises:
            ValueError: They do not add up: no example has a loss of its own.
        """
        if not self.by_example:
            self._whole_batches.compare_sum(batch, losses)

    def __call__(self, batch: Batch, numbers: Sequence[int]) -> list[Tensor]:
        """The losses of a batch, each of shape (b,).

        Args:
            batch: The examples.
            numbers: Their numbers in the calibration set.

        Raises:
            ValueError: A loss is not finite or does not depend on any trainable parameter.
        """
        for loss in (losses := self._losses(batch, numbers)):
            check_finite(loss, numbers)
            if not loss.requires_grad:
                raise ValueError(
                    "the loss does not depend on any trainable parameter: set requires_grad on "
                    "what the forward pass uses (with Arrow, the experts and not the router)"
                )
        return losses

    def _losses(self, batch: Batch, numbers: Sequence[int]) -> list[Tensor]:
        """The losses of a batch, before they are checked.

        Raises:
            OwnLossError: The batch has another loss than the recognized one.
        """
        if isinstance(self._loss_fn, ExampleLoss):
            assert isinstance(batch, OneExample)
            return [self._loss_fn.function(batch.inputs).reshape(1)]
        if self._loss_fn is not None:
            return [self._losses_of_caller(self._loss_fn, batch)]
        batch = self.padding.cut(batch)
        if self._likelihood is None:
            own = loss_of(self.forward(batch, with_labels=True))
            if own is None:
                raise ValueError("the model returns a loss for some examples only")
            return [scalar(own).reshape(1)]
        comparing = self._whole_batches.wants_own_loss(batch)
        try:
            outputs = self.forward(batch, with_labels=comparing)
        except IndexError:
            check_labels(self.forward, batch)
            raise
        logits, labels = logits_of(outputs), labels_of(batch)
        self._compare(batch, numbers, outputs, with_own=comparing)
        del outputs  # With the graph of the model's own loss.
        shifted = getattr(self._likelihood, "shifted", False)
        if shifted and self.forward.ignores_left_padding(batch):
            labels = predicted_from_text(labels, batch)
        if self._estimator == "empirical":
            return [self._likelihood.losses(logits, labels)]
        return expected_losses(
            self._likelihood,
            logits,
            labels,
            numbers,
            power=self.power,
            draws=self._label_samples,
            seed=self._seed,
        )

    def _compare(
        self, batch: Batch, numbers: Sequence[int], outputs: Any, *, with_own: bool
    ) -> None:
        assert self._likelihood is not None
        likelihood = self._likelihood
        try:
            self._whole_batches.compare(likelihood, batch, numbers, outputs, with_own=with_own)
        except OwnLossError:
            self._likelihood = None
            self.forward.predicts_first_token = True
            raise

    @torch.no_grad()
    def _own_loss(self, batch: Batch) -> Tensor | None:
        """The model's own loss of a batch, without a graph."""
        return loss_of(self.forward(batch, with_labels=True))

    def _losses_of_caller(self, loss_fn: LossFunction, batch: Batch) -> Tensor:
        size = batch_size(batch)
        outputs = self.forward(batch, with_labels=False)
        loss = loss_fn(outputs, batch)
        if _shape(loss) != (size,):
            raise ValueError(
                f"loss_fn returned {_shape(loss)} for {size} examples: one loss per example, "
                f"shape ({size},), is needed (reduction='none')"
            )
        if size > 1 and not self._is_independent:
            check_independent(loss, logits_of(outputs))
            self._is_independent = True
        return loss


def _shape(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
