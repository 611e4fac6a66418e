"""Sums of powers of per-example gradients, and how much of a batch they hold."""

from collections import Counter, defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn


class GradientSums:
    """sum_i |g_i|^power over the gradients g_i of single examples, entry by entry.

    Args:
        parameters: The parameters by name.
        power: 2 for Fisher information (arXiv 2504.04050, equation 3), 1 for magnitudes.

    Attributes:
        totals: The sums by name: shape and device of the parameter, in `precision(parameter)`.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], power: int) -> None:
        self.parameters, self.power = dict(parameters), power
        self.totals = {name: zeros(parameter) for name, parameter in parameters.items()}

    def add(self, name: str, gradients: Tensor) -> None:
        """Adds the gradients of some examples, (b, *shape), and overwrites them."""
        self.totals[name] += self._powers(gradients).sum(0)

    def add_rows(self, name: str, rows: Tensor, gradients: Tensor) -> None:
        """Adds gradients (n, d) of single rows (n,) of a matrix, and overwrites them."""
        self.totals[name].index_add_(0, rows, self._powers(gradients))

    def norm(self, name: str) -> Tensor:
        """The norm of all gradients added so far, as a scalar."""
        return self.totals[name].sum() ** (1 / self.power)

    def reset(self) -> None:
        """Sets all sums to zero."""
        for total in self.totals.values():
            total.zero_()

    def _powers(self, gradients: Tensor) -> Tensor:
        return gradients.square_() if self.power == 2 else gradients.abs_()


class Progress:
    """How many of a batch's leading examples each sum has; a retry skips them.

    An attempt at a batch that runs out of memory has added some examples to some sums.
    """

    def __init__(self) -> None:
        self._done: dict[int, Counter[str]] = defaultdict(Counter)

    def of_loss(self, number: int) -> Counter[str]:
        """The counts by parameter name, of one of the batch's losses."""
        return self._done[number]

    def within(self, rows: slice) -> "Progress":
        """The progress in a part of the batch."""
        part = Progress()
        for number, done in self._done.items():
            for name, count in done.items():
                part._done[number][name] = min(max(count - rows.start, 0), rows.stop - rows.start)
        return part

    def reset(self) -> None:
        """Starts over."""
        self._done.clear()


def zeros(parameter: Tensor) -> Tensor:
    """A sum of no gradients, on the parameter's device."""
    return torch.zeros_like(parameter, dtype=precision(parameter), requires_grad=False)


def precision(parameter: Tensor) -> torch.dtype:
    """The dtype in which gradients of a parameter are added up: float64 or float32."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32
