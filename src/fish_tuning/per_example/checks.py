"""Checks that the per-example gradients of one backward pass are right.

Each raises `OnePassError` if they are not. The error lists the modules to recompute.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fish_tuning.parts import totals
from fish_tuning.per_example.errors import OnePassError
from fish_tuning.per_example.rows import add_rows
from fish_tuning.per_example.sources import Bundle, Call, Sources
from fish_tuning.per_example.sums import GradientSums


def input_of(
    sources: Sources, module: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any
) -> Tensor:
    """The input of a module; a recomputed module has to take one tensor and return one."""
    values = [*args, *kwargs.values()]
    x = values[0] if values else None
    if module in sources.recomputed:
        alone = len(args) == 1 and all(value is None for value in values[1:])
        if not (alone and isinstance(x, Tensor) and isinstance(output, Tensor)):
            raise OnePassError(
                f"{sources.parameter_of(module)} is part of a {type(module).__name__}, which does "
                "not take and return exactly one tensor"
            )
    assert isinstance(x, Tensor)
    return x


def check_batch_axis(sources: Sources, module: nn.Module, x: Tensor, size: int) -> None:
    """Checks that a module's input has one row for each of `size` examples."""
    if x.shape[:1] != (size,):
        raise OnePassError(
            f"the module of {sources.parameter_of(module)} is given {tuple(x.shape)} for "
            f"{size} example{'s' * (size != 1)}: its first axis is not the batch",
            [module],
        )


def check_shared_rows(
    sources: Sources, shared: Sequence[tuple[nn.Module, Tensor]], losses: Tensor
) -> None:
    """Checks that each example's loss depends on its own row alone.

    A module that is called with one row for the whole batch has its output expanded to a row for
    each example. A model that then reads the first row for all of them gets past `TotalsCheck`:
    the sum over the examples is right.

    Args:
        sources: Which parameters a module has.
        shared: The modules, and their expanded outputs (b, ...).
        losses: One loss per example, (b,).
    """
    size = len(losses)
    for example in (0, size - 1):
        gradients = torch.autograd.grad(
            losses[example], [rows for _, rows in shared], retain_graph=True, allow_unused=True
        )
        others = [row for row in range(size) if row != example]
        for (module, _), gradient in zip(shared, gradients, strict=True):
            if gradient is not None and gradient[others].any():
                raise OnePassError(
                    f"the module of {sources.parameter_of(module)} is given one row for "
                    f"{size} examples, and the model mixes them"
                )


class TotalsCheck:
    """Compares the sum of the per-example gradients with the gradient that autograd gives.

    This finds parameters that the model uses without calling their modules, and layers that mix
    the examples of a batch.

    Args:
        sums: Where the gradients are added up.
    """

    def __init__(self, sums: GradientSums) -> None:
        self._sums = sums
        self._totals = {name: torch.zeros_like(total) for name, total in sums.totals.items()}
        self._rounding: dict[str, Tensor] = {}
        self._eps: dict[str, float] = {}

    def note_calls(self, bundle: Bundle, calls: Sequence[Call]) -> None:
        """Notes how large rounding errors may be: they scale with the norms of both factors."""
        # float32 parameters may have been used in half precision: under autocast, or where
        # fully_shard has a policy for it, which shows in the gradients.
        dtypes = [
            self._sums.parameters[bundle[0]].dtype,
            *(call.autocast for call in calls),
            *(call.g.dtype for call in calls),
        ]
        self._eps |= dict.fromkeys(bundle, max(torch.finfo(d).eps for d in dtypes if d is not None))
        like = self._sums.totals[bundle[0]]
        size = sum((_rounding(call, like) for call in calls), start=like.new_zeros(()))
        self._rounding |= dict.fromkeys(bundle, size)

    def add(self, name: str, gradients: Tensor) -> None:
        """Adds gradients of some examples, (b, *shape of the rows)."""
        self._totals[name] += gradients.sum(0)

    def add_rows(self, name: str, rows: Tensor, gradients: Tensor) -> None:
        """Adds gradients (n, d) of some rows (n,) of a matrix, as `GradientSums.add_rows`."""
        add_rows(self._totals[name], rows, gradients)

    @torch.no_grad()
    def compare(self, sources: Sources, gradients: Mapping[str, Tensor]) -> None:
        """Compares with the gradients of the batch, by name; those left out are 0.

        Where parameters are divided among processes, all have to call; all find the same.
        """
        names = list(self._totals)
        norms = [self._norms(name, gradients.get(name)) for name in names]
        # Read together: on an accelerator, each read waits for the device.
        device = norms[0].device
        together = torch.stack([each.to(device, torch.float32) for each in norms])
        different, scale, added, rounding = together.cpu().double().unbind(1)
        # Norms of rows give the norm of the tensor once their powers are added up.
        power = self._sums.power
        squares = torch.stack([different**2, scale**2, added**power], 1)
        squares = totals([self._sums.parts[name] for name in names], squares)
        # Gradients may cancel between examples, so the norm over single examples counts too. They
        # may also cancel between tokens, down to rounding errors of the factors (the bias of a key
        # in attention).
        scale = squares[:, 1].sqrt() + squares[:, 2] ** (1 / power)
        eps = torch.tensor([self._eps_of(name) for name in names], dtype=torch.float64)
        allowed = (8 * eps).clamp(min=1e-3) * scale + 16 * eps * rounding
        right = (squares[:, 0].sqrt() <= allowed).tolist()
        wrong = [name for name, is_right in zip(names, right, strict=True) if not is_right]
        if wrong:
            raise OnePassError(
                f"the gradient of {wrong[0]} is not the one its module's inputs give",
                sources.modules_of(wrong),
            )

    def _norms(self, name: str, gradient: Tensor | None) -> Tensor:
        """Norms of this process's rows: of the difference, the gradient and all examples'.

        The fourth number is the size of rounding errors.
        """
        total = self._totals[name]
        gradient = torch.zeros_like(total) if gradient is None else gradient
        examples = self._sums.totals[name].sum() ** (1 / self._sums.power)
        rounding = self._rounding.get(name, torch.zeros_like(examples))
        return torch.stack(
            [
                norm.to(total.dtype)
                for norm in ((total - gradient).norm(), gradient.norm(), examples, rounding)
            ]
        )

    def _eps_of(self, name: str) -> float:
        return self._eps.get(name, torch.finfo(self._sums.parameters[name].dtype).eps)


def _rounding(call: Call, like: Tensor) -> Tensor:
    """|x| |g| for a weight and |g| sqrt(n) for a bias, as one bound for both."""
    # The input of an embedding is indices, not a factor.
    x = call.x.to(like.dtype).norm() if call.x.is_floating_point() else 0.0
    size: Tensor = call.g.to(like.dtype).norm() * (x + call.g.numel() ** 0.5)
    return size
