"""What is kept of the gradients of single examples: entries' powers, or moments of rows."""

from typing import Protocol

import torch
from torch import Tensor


class Reduction(Protocol):
    """Adds up a parameter's per-example gradients, (b, *parameter's shape).

    Attributes:
        power: How the sum grows with the gradient: scaling it by s scales the sum by s^power.
    """

    power: int

    def zeros(self, parameter: Tensor) -> Tensor:
        """A sum over no examples: on the parameter's device, float32 or float64."""

    def add(self, total: Tensor, gradients: Tensor) -> None:
        """Adds those of some examples; `gradients` may be overwritten."""

    def norm(self, total: Tensor) -> Tensor:
        """An estimate of the gradients' size: a scalar that scales as they do."""


class Entrywise:
    """sum_i |g_i|^power, entry by entry.

    Args:
        power: 2 for Fisher information, arXiv 2504.04050 equation 3; 1 for magnitudes.
    """

    def __init__(self, power: int) -> None:
        self.power = power

    def zeros(self, parameter: Tensor) -> Tensor:
        """A sum of the parameter's shape."""
        return torch.zeros_like(parameter, dtype=precision(parameter), requires_grad=False)

    def raised(self, gradients: Tensor) -> Tensor:
        """|g|^power, in place."""
        return gradients.square_() if self.power == 2 else gradients.abs_()

    def add(self, total: Tensor, gradients: Tensor) -> None:
        """Adds sum_i |g_i|^power."""
        total += self.raised(gradients).sum(0)

    def norm(self, total: Tensor) -> Tensor:
        """The gradients' norm, all examples and entries together."""
        return total.sum() ** (1 / self.power)


class RowMoments:
    """sum_i g_i^T g_i, (d, d), of gradients that are matrices (r, d).

    The second moments of their rows, where `Entrywise` keeps those of single entries.
    """

    power = 2

    def zeros(self, parameter: Tensor) -> Tensor:
        """(d, d) for a parameter (r, d)."""
        size = parameter.shape[-1]
        return torch.zeros(size, size, dtype=precision(parameter), device=parameter.device)

    def add(self, total: Tensor, gradients: Tensor) -> None:
        """Adds sum_i g_i^T g_i."""
        rows = gradients.flatten(0, 1)
        total.addmm_(rows.T, rows)

    def norm(self, total: Tensor) -> Tensor:
        """The Frobenius norm of all gradients together."""
        return total.trace().sqrt()


def precision(parameter: Tensor) -> torch.dtype:
    """What gradients of a parameter are added up in."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32
