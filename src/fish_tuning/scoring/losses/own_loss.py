"""Which likelihoods agree with the loss that a model itself returns."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from fish_tuning.scoring.losses.likelihood import Likelihood

DIRECTIONS = 8
"""Number of random directions on which large gradients are compared."""


class OwnLoss:
    """A model's own loss, compared with likelihoods of the same logits and labels.

    Both the value and the gradient with respect to the logits have to agree: at logits near 0 many
    losses have the same value. Gradients are as large as the logits, which a large vocabulary makes
    the largest tensor of all. So no two of them are kept at a time, and let go of the logits before
    you call `agreeing`.

    Args:
        loss: The model's own loss.
        logits: Its logits.
        labels: The labels.
        kinds: Likelihoods that fit the shapes of logits and labels.
    """

    def __init__(
        self, loss: Tensor, logits: Tensor, labels: Tensor, kinds: Sequence[Likelihood]
    ) -> None:
        eps = max(torch.finfo(loss.dtype).eps, torch.finfo(logits.dtype).eps)
        self._tolerance = max(1e-4, 4 * eps)
        self._loss = loss
        differentiable = loss.requires_grad and logits.requires_grad
        self._logits = get_gradient_edge(logits) if differentiable else None
        self._candidates: list[tuple[float, Likelihood, Tensor | None]] = []
        for kind in kinds:
            leaf = logits.detach().requires_grad_()
            known = kind.losses(leaf, labels).sum()
            distance = float((known - loss).detach().abs())
            if distance > self._tolerance * float(loss.detach().abs()) + 1e-4:
                continue
            gradient = None
            if differentiable:
                gradient = projected(torch.autograd.grad(known, leaf)[0])
            self._candidates.append((distance, kind, gradient))

    def agreeing(self) -> list[Likelihood]:
        """The likelihoods that agree, the closest first."""
        own = None
        if self._logits is not None and self._candidates:
            # None if the loss is not computed from these logits.
            (own,) = torch.autograd.grad(self._loss, self._logits, allow_unused=True)
            own = None if own is None else projected(own)
        # The tolerance of half precision may admit two likelihoods. The sort is stable.
        by_distance = sorted(self._candidates, key=lambda candidate: candidate[0])
        return [kind for _, kind, known in by_distance if self._equal(known, own)]

    def _equal(self, known: Tensor | None, own: Tensor | None) -> bool:
        if known is None or own is None:
            return True
        return bool((known - own).norm() <= self._tolerance * known.norm() + 1e-6)


def projected(gradient: Tensor) -> Tensor:
    """A gradient (..., C) on a few random directions: all norms stay about the same.

    This is the Johnson-Lindenstrauss lemma: for normal directions r, the mean of (r^T g)^2 over
    many of them is |g|^2.
    """
    classes = gradient.shape[-1]
    if classes <= DIRECTIONS:
        return gradient
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(classes, DIRECTIONS, generator=generator) / DIRECTIONS**0.5
    projected: Tensor = gradient @ directions.to(gradient)
    return projected
