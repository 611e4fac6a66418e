"""The losses whose gradients are scored: a batch -> one value per example."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fish_tuning.config import Estimator, TokenReduction
from fish_tuning.scoring.inputs.batches import IGNORED, LABELS, Batch, OneExample, batch_size, take
from fish_tuning.scoring.inputs.forward import Forward
from fish_tuning.scoring.inputs.outputs import logits_of, loss_of
from fish_tuning.scoring.inputs.padding import without_padding
from fish_tuning.scoring.likelihood import (
    LIKELIHOODS,
    Likelihood,
    Regression,
    Tokens,
    check_classes,
    generator_of,
)
from fish_tuning.scoring.own_loss import OwnLoss

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
        self._estimator, self._label_samples, self._seed = estimator, label_samples, seed
        self._reduction, self._loss_fn = token_reduction, loss_fn
        self._likelihood: Likelihood | None = None

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

    def read(self, value: Any) -> Batch:
        """What a loader yields as a batch, with its tensors on the model's device.

        Raises:
            ValueError: It is not certain what the items of the batch mean.
        """
        return self.forward.read(value, only_labels=self._loss_fn is None)

    def has_label(self, batch: Batch) -> bool:
        """Whether the batch has an example to recognize the loss by.

        An example whose labels are all -100 has no loss; it scores 0.
        """
        if self._loss_fn is not None:
            return True
        labels = _labels_of(batch)
        return not _has_token_labels(labels) or bool((labels != IGNORED).any())

    def recognize(self, batch: Batch) -> None:
        """Calls the model with one example and finds out how its loss is computed.

        Raises:
            ValueError: The outputs and the batch give no loss.
        """
        position = _most_labeled(batch)
        one = take(batch, slice(position, position + 1))
        try:
            outputs = self.forward(one, with_labels=self._loss_fn is None)
        except IndexError:
            self._check_labels(one)
            raise
        if self._loss_fn is not None:
            return
        own = loss_of(outputs)
        logits = logits_of(outputs)
        labels = _labels_of(one)
        if labels is None and own is None:
            keys = ", ".join(one) if isinstance(one, Mapping) else f"{len(one)} unnamed items"
            raise ValueError(
                f"the calibration batches have no labels (keys: {keys}): name the column 'labels', "
                "or pass a loss_fn(outputs, batch)"
            )
        if own is not None:
            _check_finite(own.reshape(1), [position])
        shapes = _shape(logits), _shape(labels)
        fitting: list[Likelihood] = []
        if isinstance(labels, Tensor) and isinstance(logits, Tensor):
            fitting = [kind for kind in LIKELIHOODS if kind.fits(logits, labels)]
            if own is not None:
                comparison = OwnLoss(own, logits, labels, fitting)
                del outputs, logits
                fitting = comparison.agreeing()
            elif logits.shape[-1] == 1 and Regression() in fitting:
                # transformers also treats a single output as regression.
                fitting = [Regression()]
        if not fitting:
            self._check_own_loss(own, *shapes)
            return
        kind = fitting[0]
        if isinstance(kind, Tokens):
            kind = replace(kind, reduction=self._reduction)
        self._likelihood = kind

    def _check_labels(self, one: Batch) -> None:
        """Says so if the model failed because a label is not one of its classes."""
        labels = _labels_of(one)
        if self._loss_fn is None and isinstance(labels, Tensor) and not labels.is_floating_point():
            logits = logits_of(self.forward(one, with_labels=False))
            if isinstance(logits, Tensor):
                check_classes(logits, labels)

    def _check_own_loss(self, own: Tensor | None, logits: object, labels: object) -> None:
        if own is None:
            raise ValueError(
                f"no likelihood fits logits of shape {logits} and labels of shape {labels}, and "
                "the model returns no loss: pass a loss_fn(outputs, batch)"
            )
        if self._estimator == "true" or self._reduction == "sum":
            raise ValueError(
                "the model's own loss is not one of the known likelihoods; score it with "
                "estimator='empirical' and token_reduction='mean', or pass a loss_fn"
            )

    def __call__(self, batch: Batch, numbers: Sequence[int]) -> list[Tensor]:
        """The losses of a batch, each of shape (b,).

        Args:
            batch: The examples.
            numbers: Their numbers in the calibration set.

        Raises:
            ValueError: A loss is not finite or does not depend on any trainable parameter.
        """
        losses = self._losses(batch, numbers)
        for loss in losses:
            _check_finite(loss, numbers)
            if not loss.requires_grad:
                raise ValueError(
                    "the loss does not depend on any trainable parameter: set requires_grad on "
                    "what the forward pass uses (with Arrow, the experts and not the router)"
                )
        return losses

    def _losses(self, batch: Batch, numbers: Sequence[int]) -> list[Tensor]:
        if isinstance(self._loss_fn, ExampleLoss):
            assert isinstance(batch, OneExample)
            return [self._loss_fn.function(batch.inputs).reshape(1)]
        size = batch_size(batch)
        if self._loss_fn is not None:
            loss = self._loss_fn(self.forward(batch, with_labels=False), batch)
            if _shape(loss) != (size,):
                raise ValueError(
                    f"loss_fn returned {_shape(loss)} for {size} examples: one loss per example, "
                    f"shape ({size},), is needed (reduction='none')"
                )
            return [loss]
        batch = without_padding(batch)
        if self._likelihood is None:
            return [self._own_loss(batch).reshape(1)]
        logits = logits_of(self.forward(batch, with_labels=False))
        labels = _labels_of(batch)
        if isinstance(self._likelihood, Tokens) and self._likelihood.shifted:
            labels = _predicted_from_text(labels, batch)
        if self._estimator == "empirical":
            return [self._likelihood.losses(logits, labels)]
        return self._expected(self._likelihood, logits, labels, numbers)

    def _own_loss(self, batch: Batch) -> Tensor:
        loss = loss_of(self.forward(batch, with_labels=True))
        if loss is None:
            raise ValueError("the model returned a loss for the first example, but not for others")
        return loss

    def _expected(
        self, likelihood: Likelihood, logits: Tensor, labels: Tensor, numbers: Sequence[int]
    ) -> list[Tensor]:
        """Losses whose sum of |gradient|^power is its expectation over labels, or estimates it."""
        if self._label_samples is None:
            exact = likelihood.expectation(logits, self.power)
            if exact is not None:
                return exact
        draws = self._label_samples or 1
        losses = []
        for draw in range(draws):
            generators = [generator_of(self._seed, number, draw) for number in numbers]
            drawn = likelihood.draw(logits, labels, generators)
            losses.append(draws ** (-1 / self.power) * likelihood.losses(logits, drawn))
        return losses


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Checks that an argument has one of its allowed values.

    Raises:
        ValueError: It has another value.
    """
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, allowed))}")


def _labels_of(batch: Batch) -> Any:
    if isinstance(batch, Mapping):
        return batch.get(LABELS)
    return batch[1] if len(batch) > 1 else None


def _has_token_labels(labels: Any) -> bool:
    return isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dim() > 1


def _most_labeled(batch: Batch) -> int:
    """The example with the most labels; one without labels has no loss to compare."""
    labels = _labels_of(batch)
    if not _has_token_labels(labels):
        return 0
    return int((labels != IGNORED).flatten(1).sum(1).argmax())


def _predicted_from_text(labels: Tensor, batch: Batch) -> Tensor:
    """The labels without that of the first token after padding on the left.

    Nothing predicts the first token of an unpadded example, so padding must not either.
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.shape != labels.shape:
        return labels
    return labels.masked_fill(F.pad(mask[:, :-1], (1, 0), value=1) == 0, IGNORED)


def _shape(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _check_finite(losses: Tensor, numbers: Sequence[int]) -> None:
    losses = losses.detach()
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad):
        i = int(bad[0])
        raise ValueError(
            f"the loss of calibration example {numbers[i]} is {float(losses[i])}: look at its "
            "inputs and labels, and at the model's weights (half precision overflows easily)"
        )
