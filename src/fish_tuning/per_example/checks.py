"""Checks that the per-example gradients of one backward pass are right.

Each raises `OnePassError` if they are not. The error lists the modules to recompute.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fish_tuning.per_example.sources import Bundle, Call, OnePassError, Sources
from fish_tuning.per_example.sums import GradientSums, zeros


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
        self._totals = {name: zeros(parameter) for name, parameter in sums.parameters.items()}
        self._rounding: dict[str, Tensor] = {}
        self._eps: dict[str, float] = {}

    def note_calls(self, bundle: Bundle, calls: Sequence[Call]) -> None:
        """Notes how large rounding errors may be: they scale with the norms of both factors."""
        # float32 parameters may have been used in half precision, under autocast.
        dtypes = [self._sums.parameters[bundle[0]].dtype, *(call.autocast for call in calls)]
        self._eps |= dict.fromkeys(bundle, max(torch.finfo(d).eps for d in dtypes if d is not None))
        like = self._sums.totals[bundle[0]]
        size = sum((_rounding(call, like) for call in calls), start=like.new_zeros(()))
        self._rounding |= dict.fromkeys(bundle, size)

    def add(self, name: str, gradients: Tensor) -> None:
        """Adds gradients of some examples, (b, *shape)."""
        self._totals[name] += gradients.sum(0)

    def add_rows(self, name: str, rows: Tensor, gradients: Tensor) -> None:
        """Adds gradients (n, d) of single rows (n,) of a matrix."""
        self._totals[name].index_add_(0, rows, gradients)

    @torch.no_grad()
    def compare(self, sources: Sources, gradients: Sequence[Tensor | None]) -> None:
        """Compares with the gradients of the batch, in the order of the parameters."""
        excess = {}
        for (name, parameter), gradient in zip(
            self._sums.parameters.items(), gradients, strict=True
        ):
            gradient = torch.zeros_like(parameter) if gradient is None else gradient
            difference = (self._totals[name] - gradient).norm()
            excess[name] = difference - self._allowed(name, parameter, gradient)
        # Read together: on an accelerator, each read waits for the device.
        device = next(iter(self._sums.totals.values())).device
        together = torch.stack([beyond.to(device, torch.float32) for beyond in excess.values()])
        wrong = [
            name for name, beyond in zip(excess, together.tolist(), strict=True) if not beyond <= 0
        ]
        if wrong:
            raise OnePassError(
                f"the gradient of {wrong[0]} is not the one its module's inputs give",
                sources.modules_of(wrong),
            )

    def _allowed(self, name: str, parameter: Tensor, gradient: Tensor) -> Tensor:
        eps = self._eps.get(name, torch.finfo(parameter.dtype).eps)
        # Gradients may cancel between examples, so the norm over single examples counts too. They
        # may also cancel between tokens, down to rounding errors of the factors (the bias of a key
        # in attention).
        scale = gradient.norm() + self._sums.norm(name)
        rounding = self._rounding.get(name, torch.zeros_like(scale))
        allowed: Tensor = max(1e-3, 8 * eps) * scale + 16 * eps * rounding
        return allowed


def _rounding(call: Call, like: Tensor) -> Tensor:
    """|x| |g| for a weight and |g| sqrt(n) for a bias, as one bound for both."""
    # The input of an embedding is indices, not a factor.
    x = call.x.to(like.dtype).norm() if call.x.is_floating_point() else 0.0
    size: Tensor = call.g.to(like.dtype).norm() * (x + call.g.numel() ** 0.5)
    return size
