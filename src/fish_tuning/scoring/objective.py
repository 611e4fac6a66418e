"""The losses whose gradients are scored: a batch -> one value per example."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

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
    is_usual,
    kind_of,
    labels_of,
    most_labeled,
    predicted_from_text,
)
from fish_tuning.scoring.inputs.outputs import logits_of, loss_is_second, loss_of
from fish_tuning.scoring.losses.checks import (
    UNCERTAIN_LOSS,
    check_finite,
    check_independent,
    check_shift,
    scalar,
)
from fish_tuning.scoring.losses.likelihood import (
    Likelihood,
    SingleLabel,
    Tokens,
    generator_of,
)
from fish_tuning.scoring.losses.one_example import outputs_of_one
from fish_tuning.scoring.losses.own_loss import OwnLoss
from fish_tuning.scoring.losses.recognition import adds_up, explains, fitting, rounding

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


class OwnLossError(Exception):
    """A batch shows that the model's own loss is not the likelihood that one example suggested."""


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
        self._alone: tuple[int, float] | None = None
        self.padding = Padding(forward)
        self._checked: set[frozenset[str]] = set()

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
        labels = labels_of(batch)
        return not has_classes(labels) or bool((labels != IGNORED).any())

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
            self._alone = None if own is None else (numbers[position], float(own.detach()))
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
            self._check_own_loss(own, *shapes, certain=not after_logits)

    def check_batch(self, batch: Batch, numbers: Sequence[int]) -> None:
        """Compares the recognized loss of a batch that is scored one by one with the model's own.

        Raises:
            OwnLossError: The batch has another loss.
            ValueError: The loss of an example changes with the batch that it is in.
        """
        if self._likelihood is not None and len(numbers) > 1 and self._is_worth_checking(batch):
            with torch.no_grad():
                outputs = self.forward(batch, with_labels=True)
            self._check_likelihood(self._likelihood, batch, numbers, outputs)

    def check_together(self, batch: Batch, losses: Sequence[Tensor]) -> None:
        """Compares losses of single examples with the loss that their batch has as a whole.

        Args:
            batch: The batch.
            losses: The loss of each example, taken alone.

        Raises:
            ValueError: They do not add up: no example has a loss of its own.
        """
        if self.by_example or len(losses) < 2 or not self._is_worth_checking(batch):
            return
        with torch.no_grad():
            own = loss_of(self.forward(batch, with_labels=True))
        if own is None:
            return
        together, alone = own.mean(), torch.stack([loss.detach().reshape(()) for loss in losses])
        labels = labels_of(batch)
        if not adds_up(alone.to(together), labels, together, rounding(self.forward.base)):
            raise ValueError(
                f"the model's loss of {len(losses)} examples is {float(together):.6g}, and their "
                f"own losses, {float(alone.mean()):.6g} on average, do not add up to it: it "
                "compares or weighs the examples of a batch (class weights, a router's balance, "
                "in-batch negatives), so that no example has a loss of its own. Leave that term "
                "out (output_router_logits=False), or pass a loss_fn(outputs, batch) with one loss "
                "per example"
            )
        self._checked.add(kind_of(batch))

    def _check_own_loss(
        self, own: Tensor | None, logits: object, labels: object, *, certain: bool = True
    ) -> None:
        if own is None:
            raise ValueError(
                f"no likelihood fits logits of shape {logits} and labels of shape {labels}, and "
                "the model returns no loss: pass a loss_fn(outputs, batch)"
            )
        if not certain:
            raise ValueError(UNCERTAIN_LOSS)
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
        checking = self._is_worth_checking(batch)
        outputs = self.forward(batch, with_labels=checking)
        logits, labels = logits_of(outputs), labels_of(batch)
        if checking:
            self._check_likelihood(self._likelihood, batch, numbers, outputs)
        del outputs  # With the graph of the model's own loss.
        shifted = isinstance(self._likelihood, Tokens) and self._likelihood.shifted
        if shifted and self.forward.ignores_left_padding(batch):
            labels = predicted_from_text(labels, batch)
        if self._estimator == "empirical":
            return [self._likelihood.losses(logits, labels)]
        return self._expected(self._likelihood, logits, labels, numbers)

    def _losses_of_caller(self, loss_fn: LossFunction, batch: Batch) -> Tensor:
        size = batch_size(batch)
        outputs = self.forward(batch, with_labels=False)
        loss = loss_fn(outputs, batch)
        if _shape(loss) != (size,):
            raise ValueError(
                f"loss_fn returned {_shape(loss)} for {size} examples: one loss per example, "
                f"shape ({size},), is needed (reduction='none')"
            )
        if size > 1 and not self._checked:
            check_independent(loss, logits_of(outputs))
            self._checked.add(kind_of(batch))
        return loss

    def _is_worth_checking(self, batch: Batch) -> bool:
        """Whether to compare with the model's own loss.

        Always, as weights of classes or tokens may show late: in a set that is sorted by class, or
        with the first rare token. Only the losses that transformers computes for tokens have no
        such weights, and cost much to compare. They are compared on every kind of batch once.
        """
        labels = labels_of(batch)
        if not has_classes(labels) or labels.dim() < 2 or not is_usual(batch):
            return True
        if self.forward.has_own_loss:
            return True
        return batch_size(batch) > 1 and kind_of(batch) not in self._checked

    def _check_likelihood(
        self, likelihood: Likelihood, batch: Batch, numbers: Sequence[int], outputs: Any
    ) -> None:
        """Compares the recognized loss with the model's own of a batch, and of one example alone.

        Raises:
            OwnLossError: The batch has another loss.
            ValueError: The loss of an example changes with the batch that it is in.
        """
        own, logits, labels = loss_of(outputs), logits_of(outputs), labels_of(batch)
        if own is None or bool(torch.isnan(own).any()):
            pass  # Nothing to compare with: no example has a label.
        elif not explains(likelihood, logits, labels, own.mean()):
            self._likelihood = None
            self.forward.predicts_first_token = True
            self._check_own_loss(own, _shape(logits), _shape(labels))
            raise OwnLossError("the model's own loss is not one of the known per-example losses")
        if self._alone is not None and self._alone[0] in numbers and len(numbers) > 1:
            number, alone = self._alone
            if isinstance(likelihood, Tokens):
                likelihood = replace(likelihood, reduction="mean")
            with torch.no_grad():
                within = likelihood.losses(logits, labels)[list(numbers).index(number)]
            self._check_alone(number, alone, float(within))
        if len(numbers) > 1:
            self._checked.add(kind_of(batch))

    def _check_alone(self, number: int, alone: float, within: float) -> None:
        if abs(alone - within) > max(1e-2, rounding(self.forward.base)) * abs(alone) + 1e-4:
            raise ValueError(
                f"calibration example {number} has the loss {alone:.6g} alone and {within:.6g} "
                "within its batch: the model mixes the examples of a batch, or an entry of the "
                "batch is not divided by example: use batches of one example (batch_size=1)"
            )

    def _expected(
        self, likelihood: Likelihood, logits: Tensor, labels: Tensor, numbers: Sequence[int]
    ) -> list[Tensor]:
        """Losses whose sum of |gradient|^power is its expectation over labels, or estimates it."""
        if self._label_samples is None:
            exact = likelihood.expectation(logits, self.power)
            if exact is not None and isinstance(likelihood, SingleLabel):
                labeled = likelihood.counts(logits, labels)
                return [labeled * loss for loss in exact]
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


def _shape(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
