"""log p(y | x) of each example, for the likelihoods that models are trained with.

Models return the mean loss of a batch, so the losses of its examples are computed here, from the
logits. Each class knows its negative log-likelihood, how to draw labels from the model's own
p(y | x), and the expectation over these labels (the true Fisher information) if it is a short sum.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fish_tuning.config import TokenReduction
from fish_tuning.scoring.inputs.batches import IGNORED
from fish_tuning.scoring.losses.token_losses import labeled_chunks, precise, token_losses


class Likelihood(Protocol):
    """A family of distributions p(y | logits)."""

    def fits(self, logits: Tensor, labels: Tensor) -> bool:
        """Whether logits and labels have the shapes and types of this family."""
        ...

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The negative log-likelihood of each example, shape (b,)."""
        ...

    def counts(self, logits: Tensor, labels: Tensor) -> Tensor:
        """How many labels each example has that are part of the likelihood, shape (b,)."""
        ...

    def expectation(self, logits: Tensor, power: int) -> list[Tensor] | None:
        """Losses, shape (b,) each, with sum_j |grad loss_j|^power = E_y |grad log p(y | x)|^power.

        None if that takes too many losses; then labels have to be drawn.
        """
        ...

    def draw(self, logits: Tensor, labels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Draws labels from p(y | logits), for each example with its own generator."""
        ...


@dataclass(frozen=True)
class SingleLabel:
    """One class per example: logits (b, C), integer labels (b,), -100 where there is none."""

    def fits(self, logits: Tensor, labels: Tensor) -> bool:
        return (
            logits.dim() == 2
            and logits.shape[1] > 1
            and labels.shape == logits.shape[:1]
            and not labels.is_floating_point()
        )

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        check_classes(logits, labels)
        return F.cross_entropy(precise(logits), labels.long(), reduction="none")

    def counts(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (labels != IGNORED).to(_precise_type(logits))

    def expectation(self, logits: Tensor, power: int) -> list[Tensor]:
        """Every class in turn, weighted by its probability: sum_c p_c |grad log p_c|^power."""
        log_p = F.log_softmax(precise(logits), -1)
        weights = log_p.detach().exp() ** (1 / power)
        return [-weights[:, c] * log_p[:, c] for c in range(logits.shape[1])]

    def draw(self, logits: Tensor, labels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        uniform = torch.stack([torch.rand((), generator=g) for g in generators])
        return torch.where(labels == IGNORED, IGNORED, _inverse_cdf(logits, uniform))


@dataclass(frozen=True)
class Tokens:
    """One class per token: logits (b, t, C), integer labels (b, t), -100 where there is none.

    Attributes:
        shifted: Whether the logits at a position predict the next token (causal language models).
        reduction: "mean" over an example's labeled tokens, as models are trained, or "sum", the
            log-likelihood of the whole label sequence.
    """

    shifted: bool
    reduction: TokenReduction = "mean"

    def fits(self, logits: Tensor, labels: Tensor) -> bool:
        return (
            logits.dim() == 3
            and labels.dim() == 2
            and len(labels) == len(logits)
            and labels.shape[1] <= logits.shape[1]
            and not labels.is_floating_point()
        )

    def _aligned(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The label that the logits at each position predict, (b, t)."""
        # Prompt tuning puts virtual tokens before the labeled ones.
        labels = F.pad(labels.long(), (logits.shape[1] - labels.shape[1], 0), value=IGNORED)
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED) if self.shifted else labels

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        check_classes(logits, labels)
        labels = self._aligned(logits, labels)
        by_token = token_losses(logits.flatten(0, 1), labels.flatten(), IGNORED)
        losses = by_token.view_as(labels).sum(1)
        if self.reduction == "sum":
            return losses
        return losses / (labels != IGNORED).sum(1).clamp(min=1)

    def counts(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (self._aligned(logits, labels) != IGNORED).sum(1).to(_precise_type(logits))

    def expectation(self, logits: Tensor, power: int) -> None:
        return None

    def draw(self, logits: Tensor, labels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        drawn = labels.clone()
        labels = self._aligned(logits, labels)
        labeled = labels != IGNORED
        # One number per labeled token, so that the labels do not depend on the padding.
        counts = labeled.sum(1).tolist()
        uniform = torch.cat(
            [torch.rand(n, generator=g) for n, g in zip(counts, generators, strict=True)]
        )
        of_token = logits.flatten(0, 1)
        rows = labeled_chunks(labels.flatten(), logits.shape[-1], IGNORED)
        parts = zip(rows, uniform.split([len(part) for part in rows]), strict=True)
        tokens = torch.cat([_inverse_cdf(of_token[part], u) for part, u in parts])
        padded = torch.full_like(labels, IGNORED)
        padded[labeled] = tokens
        padded = padded[:, :-1] if self.shifted else padded
        width = min(drawn.shape[1], padded.shape[1])
        drawn[:, drawn.shape[1] - width :] = padded[:, padded.shape[1] - width :]
        return drawn


@dataclass(frozen=True)
class Regression:
    """Mean squared error over C outputs: Gaussians of variance C / 2 around the outputs."""

    def fits(self, logits: Tensor, labels: Tensor) -> bool:
        return logits.dim() == 2 and labels.numel() == logits.numel()

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits = precise(logits)
        return (logits - labels.reshape(logits.shape).to(logits.dtype)).square().mean(1)

    def counts(self, logits: Tensor, labels: Tensor) -> Tensor:
        return torch.ones(len(logits), dtype=_precise_type(logits), device=logits.device)

    def expectation(self, logits: Tensor, power: int) -> list[Tensor] | None:
        """E_y (2 / C sum_c (f_c - y_c) grad f_c)^2 = 2 / C sum_c (grad f_c)^2."""
        if power != 2:
            return None
        outputs = logits.shape[1]
        return [(2 / outputs) ** 0.5 * precise(logits)[:, c] for c in range(outputs)]

    def draw(self, logits: Tensor, labels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        outputs = logits.shape[1]
        noise = torch.stack([torch.randn(outputs, generator=g) for g in generators])
        mean = precise(logits.detach())
        deviation: float = (outputs / 2) ** 0.5
        return mean + deviation * noise.to(mean)


@dataclass(frozen=True)
class MultiLabel:
    """C independent binary labels: logits (b, C), float labels (b, C); the mean over them."""

    def fits(self, logits: Tensor, labels: Tensor) -> bool:
        return logits.dim() == 2 and labels.shape == logits.shape and labels.is_floating_point()

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits = precise(logits)
        labels = labels.to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)

    def counts(self, logits: Tensor, labels: Tensor) -> Tensor:
        return torch.ones(len(logits), dtype=_precise_type(logits), device=logits.device)

    def expectation(self, logits: Tensor, power: int) -> list[Tensor] | None:
        """E_y (1 / C sum_c (p_c - y_c) grad f_c)^2 = 1 / C^2 sum_c p_c (1 - p_c) (grad f_c)^2."""
        if power != 2:
            return None
        logits = precise(logits)
        p = logits.detach().sigmoid()
        weights = (p * (1 - p)).sqrt() / logits.shape[1]
        return [weights[:, c] * logits[:, c] for c in range(logits.shape[1])]

    def draw(self, logits: Tensor, labels: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        uniform = torch.stack([torch.rand(logits.shape[1], generator=g) for g in generators])
        p = precise(logits.detach()).sigmoid()
        return (uniform.to(p) < p).to(p.dtype)


LIKELIHOODS: tuple[Likelihood, ...] = (
    SingleLabel(),
    Tokens(shifted=False),
    Tokens(shifted=True),
    MultiLabel(),
    Regression(),
)
"""All likelihoods; of those that fit the same shapes, the likelier one comes first."""


def expected_losses(
    likelihood: Likelihood,
    logits: Tensor,
    labels: Tensor,
    numbers: Sequence[int],
    *,
    power: int,
    draws: int | None,
    seed: int,
) -> list[Tensor]:
    """Losses whose sum of |gradient|^power is its expectation over labels, or estimates it.

    Args:
        likelihood: The likelihood.
        logits: The logits.
        labels: The labels, which say where there is one.
        numbers: The numbers of the examples in the calibration set.
        power: The power.
        draws: How many labels to draw per example; None for the exact expectation where it is
            known, and one label where it is not.
        seed: Seed of the labels.
    """
    if draws is None:
        exact = likelihood.expectation(logits, power)
        if exact is not None and isinstance(likelihood, SingleLabel):
            labeled = likelihood.counts(logits, labels)
            return [labeled * loss for loss in exact]
        if exact is not None:
            return exact
    losses = []
    draws = draws or 1
    for draw in range(draws):
        generators = [generator_of(seed, number, draw) for number in numbers]
        drawn = likelihood.draw(logits, labels, generators)
        losses.append(draws ** (-1 / power) * likelihood.losses(logits, drawn))
    return losses


def check_classes(logits: Tensor, labels: Tensor) -> None:
    """Checks that integer labels are classes of the logits, or -100.

    Raises:
        ValueError: One is not. On an accelerator, torch would end the process.
    """
    classes = logits.shape[-1]
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
    if wrong.numel():
        raise ValueError(
            f"label {int(wrong[0])} is not one of the model's {classes} classes, 0 to "
            f"{classes - 1}: build the model with more labels (num_labels), or correct the data; "
            f"{IGNORED} marks positions without a label"
        )


def generator_of(seed: int, example: int, draw: int) -> torch.Generator:
    """The random numbers for the labels of one example, the same in any batch."""
    digest = blake2b(f"{seed}/{example}/{draw}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def _precise_type(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _inverse_cdf(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draws classes by uniform numbers in [0, 1): (n, C), (n,) -> (n,)."""
    cdf = F.softmax(precise(logits.detach()), -1).cumsum(-1)
    drawn = torch.searchsorted(cdf, uniform.to(cdf).unsqueeze(-1)).squeeze(-1)
    return drawn.clamp(max=logits.shape[-1] - 1)
