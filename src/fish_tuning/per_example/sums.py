"""Sums of powers of per-example gradients, and how much of a batch they hold."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from fish_tuning.parts import Part
from fish_tuning.per_example.rows import add_rows
from fish_tuning.sharded_model import ShardedModel


class GradientSums:
    """sum_i |g_i|^power over the gradients g_i of single examples, entry by entry.

    If `fully_shard` has divided a parameter among processes, each of them adds up the rows that it
    holds. So the memory for sums and for gradients falls with the number of processes.

    Args:
        parameters: The parameters by name.
        power: 2 for Fisher information (arXiv 2504.04050, equation 3), 1 for magnitudes.
        model: The model that they belong to; needed if they may be divided.

    Attributes:
        parts: The rows of each parameter that this process adds up: all, if it is not divided.
        totals: The sums by name: shape and device of these rows, in `precision(parameter)`.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        power: int,
        model: ShardedModel | None = None,
    ) -> None:
        self.parameters, self.power = dict(parameters), power
        self._model = model
        self.parts = {name: Part(parameter) for name, parameter in parameters.items()}
        self.totals = {name: zeros(part.local) for name, part in self.parts.items()}

    @property
    def divided(self) -> bool:
        """Whether a parameter is divided among processes."""
        return self._model is not None and bool(self._model.parameters)

    @property
    def leaves(self) -> list[Tensor]:
        """The tensors for which autograd has the gradients of the parameters."""
        parameters: list[Tensor] = list(self.parameters.values())
        return parameters if self._model is None else self._model.leaves(parameters)

    def settle(self) -> None:
        """Has the modules hold the parameters again, after a pass of a divided model."""
        if self._model is not None:
            self._model.settle()

    def gradients(self, loss: Tensor, *, retain_graph: bool) -> dict[str, Tensor]:
        """Autograd's gradients of a loss, by name: the rows that belong to the sums.

        A parameter on which the loss does not depend is left out.
        """
        found: dict[str, Tensor] = {}

        def keep(name: str, gradient: Tensor) -> Tensor:
            # A copy: of a divided parameter, the rest need not stay; and if the model adds two
            # parameters, autograd has one tensor for both.
            found[name] = self.parts[name].take(gradient).clone()
            return gradient.new_zeros(()).expand_as(gradient)

        leaves = self.leaves
        hooks = [
            leaf.register_hook(partial(keep, name))
            for name, leaf in zip(self.parameters, leaves, strict=True)
        ]
        try:
            torch.autograd.grad(loss, leaves, retain_graph=retain_graph, allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def add(self, name: str, gradients: Tensor) -> None:
        """Adds the gradients of some examples, (b, *shape of the rows), and overwrites them."""
        self.totals[name] += self._powers(gradients).sum(0)

    def add_rows(self, name: str, rows: Tensor, gradients: Tensor) -> None:
        """Adds gradients (n, d) of some rows (n,) of a matrix, and overwrites them.

        The rows count from the first one that this process adds up.
        """
        add_rows(self.totals[name], rows, self._powers(gradients))

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
