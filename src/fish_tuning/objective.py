"""The losses whose gradients are scored: from a batch to one value an example."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from fish_tuning.batches import LABELS, Batch, Forward, batch_size, take
from fish_tuning.likelihood import (
    IGNORED,
    LIKELIHOODS,
    Likelihood,
    TokenReduction,
    Tokens,
    generator_of,
)

Estimator = Literal["empirical", "true"]
LossFunction = Callable[[Any, Batch], Tensor]
"""(outputs of the model, batch) -> one loss an example, shape (b,)."""


class Objective:
    """Losses of shape (b,) for a batch; what is scored is sum_j |gradient of loss_j|^power.

    `recognise` has to see a batch first. It settles where a loss comes from: the caller's
    `loss_fn`, a likelihood that agrees with the model's own loss, or (`by_example` is False then)
    that loss itself, which is known for one example at a time only.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        estimator: Estimator,
        power: int,
        label_samples: int | None,
        token_reduction: TokenReduction,
        loss_fn: LossFunction | None,
        seed: int,
    ) -> None:
        if loss_fn is not None and estimator == "true":
            raise ValueError(
                "estimator='true' needs the model's p(y | x), which a loss_fn does not give: use "
                "estimator='empirical', or leave loss_fn out"
            )
        if label_samples is not None and estimator == "empirical":
            raise ValueError(
                f"label_samples={label_samples}: labels are drawn with estimator='true' only"
            )
        self.forward, self.power = forward, power
        self._estimator, self._label_samples, self._seed = estimator, label_samples, seed
        self._reduction, self._loss_fn = token_reduction, loss_fn
        self._likelihood: Likelihood | None = None

    @property
    def by_example(self) -> bool:
        """Whether a batch of several examples has a loss for each."""
        return self._loss_fn is not None or self._likelihood is not None

    @torch.no_grad()
    def recognise(self, batch: Batch) -> None:
        """Calls the model with one example and finds out how its loss is made.

        Raises:
            ValueError: No loss can be made of the outputs and the batch.
        """
        one = _first_labelled(batch)
        outputs = self.forward(one, with_labels=self._loss_fn is None)
        if self._loss_fn is not None:
            return
        own = _field(outputs, "loss")
        logits = _field(outputs, "logits")
        labels = one.get(LABELS) if isinstance(one, Mapping) else (one[1] if len(one) > 1 else None)
        if labels is None and own is None:
            keys = ", ".join(one) if isinstance(one, Mapping) else f"{len(one)} unnamed items"
            raise ValueError(
                f"the calibration batches have no labels (keys: {keys}): name the column 'labels', "
                "or pass a loss_fn(outputs, batch)"
            )
        if own is not None:
            _check_finite(own.reshape(1), 0)
        if isinstance(labels, Tensor) and isinstance(logits, Tensor):
            self._likelihood = _matching(logits, labels, own, self._reduction)
        if self._likelihood is None:
            self._need_own_loss(own, logits, labels)

    def _need_own_loss(self, own: Tensor | None, logits: Any, labels: Any) -> None:
        if own is None:
            raise ValueError(
                f"no likelihood fits logits of shape {_shape(logits)} and labels of shape "
                f"{_shape(labels)}, and the model returns no loss: pass a loss_fn(outputs, batch)"
            )
        if self._estimator == "true" or self._reduction == "sum":
            raise ValueError(
                "the model's own loss is none of the known likelihoods; score it with "
                "estimator='empirical' and token_reduction='mean', or pass a loss_fn"
            )

    def __call__(self, batch: Batch, first: int) -> list[Tensor]:
        """The losses of a batch whose first example is number `first` of the calibration set.

        Raises:
            ValueError: A loss is not finite or does not depend on any trainable parameter.
        """
        losses = self._losses(batch, first)
        for loss in losses:
            _check_finite(loss, first)
            if not loss.requires_grad:
                raise ValueError("the loss does not depend on any trainable parameter")
        return losses

    def _losses(self, batch: Batch, first: int) -> list[Tensor]:
        size = batch_size(batch)
        if self._loss_fn is not None:
            loss = self._loss_fn(self.forward(batch, with_labels=False), batch)
            if _shape(loss) != (size,):
                raise ValueError(
                    f"loss_fn returned {_shape(loss)} for {size} examples: one loss an example, "
                    f"shape ({size},), is needed (reduction='none')"
                )
            return [loss]
        if self._likelihood is None:
            return [_field(self.forward(batch, with_labels=True), "loss").reshape(1)]
        logits = _field(self.forward(batch, with_labels=False), "logits")
        labels = batch[LABELS] if isinstance(batch, Mapping) else batch[1]
        if self._estimator == "empirical":
            return [self._likelihood.losses(logits, labels)]
        if self._label_samples is None:
            exact = self._likelihood.expectation(logits, self.power)
            if exact is not None:
                return exact
        draws = self._label_samples or 1
        losses = []
        for draw in range(draws):
            generators = [generator_of(self._seed, first + i, draw) for i in range(size)]
            drawn = self._likelihood.draw(logits, labels, generators)
            losses.append(draws ** (-1 / self.power) * self._likelihood.losses(logits, drawn))
        return losses


def _first_labelled(batch: Batch) -> Batch:
    """The first example that has a label at all: one without has no loss to compare."""
    labels = batch.get(LABELS) if isinstance(batch, Mapping) else None
    position = 0
    if isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dim() > 1:
        position = int((labels != IGNORED).flatten(1).any(1).float().argmax())
    return take(batch, position, position + 1)


def _matching(
    logits: Tensor, labels: Tensor, own: Tensor | None, reduction: TokenReduction
) -> Likelihood | None:
    """The likelihood that gives the model's own loss of one example; without it, what fits."""
    fitting = [kind for kind in LIKELIHOODS if kind.fits(logits, labels)]
    if own is not None:
        tolerance = max(1e-4, 8 * torch.finfo(own.dtype).eps) * (1 + float(own.abs()))
        distances = {kind: float((kind.losses(logits, labels) - own).abs()) for kind in fitting}
        fitting = [kind for kind in fitting if distances[kind] <= tolerance]
        # In half precision two readings can come as close; the order of likelihood decides then.
        if own.dtype in (torch.float32, torch.float64):
            fitting.sort(key=distances.__getitem__)
    if not fitting:
        return None
    best = fitting[0]
    return replace(best, reduction=reduction) if isinstance(best, Tokens) else best


def _field(outputs: Any, name: str) -> Any:
    """A field of a model's output; an output that is a tensor is the logits."""
    if isinstance(outputs, Tensor):
        return outputs if name == "logits" else None
    if isinstance(outputs, Mapping):
        return outputs.get(name)
    return getattr(outputs, name, None)


def _shape(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _check_finite(losses: Tensor, first: int) -> None:
    bad = (~torch.isfinite(losses.detach())).nonzero()
    if len(bad):
        i = int(bad[0])
        raise ValueError(
            f"the loss of calibration example {first + i} is {float(losses[i])}: look at its "
            "inputs and labels, and at the model's weights (half precision overflows easily)"
        )
