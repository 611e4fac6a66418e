"""Per-example gradients of a module without a closed form: its forward is run again, row by row.

Adapter layers compute y = f(theta, x) from a batch x, and what f is differs from method to method.
With the output's gradient g the gradient of example b is the vector-Jacobian product

    (d f(theta, x_b) / d theta)^T g_b,

for which f alone is run forward and back again: for all rows at once under torch.func.vmap, or row
by row where some operation of f is not made for that.
"""

import logging
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from fish_tuning.per_example.memory import is_out_of_memory

logger = logging.getLogger(__name__)


class Recomputed:
    """One module, and the parameters in it whose gradients are wanted.

    Args:
        module: Takes one tensor, whose first axis is the batch, and gives one.
        parameters: By their names in the model.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.module = module
        names = {id(parameter): name for name, parameter in parameters.items()}
        self.places = {
            names[id(parameter)]: place
            for place, parameter in module.named_parameters()
            if id(parameter) in names
        }
        self._at_once = True

    @property
    def entries(self) -> int:
        """Of the module, each of which may be there once for each row."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def gradients(self, x: Tensor, g: Tensor, autocast: torch.dtype | None) -> dict[str, Tensor]:
        """By name, (b, *shape), of inputs (b, ...) and their outputs' gradients (b, ...).

        Args:
            x: The inputs.
            g: The gradients.
            autocast: What the forward pass was cast to, if it was.
        """
        with torch.autocast(
            x.device.type, autocast, enabled=autocast is not None, cache_enabled=False
        ):
            if self._at_once:
                try:
                    return self._all_rows(x, g)
                except (RuntimeError, ValueError) as error:
                    if is_out_of_memory(error):
                        raise
                    said = str(error).partition("\n")[0]
                    logger.info("%s goes row by row: %s", type(self.module).__name__, said)
                    self._at_once = False
            rows = [self._row(*row) for row in zip(x, g, strict=True)]
        return {name: torch.stack([row[name] for row in rows]) for name in self.places}

    def _all_rows(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        values = {
            name: self.module.get_parameter(place).detach() for name, place in self.places.items()
        }

        def of_row(x: Tensor, g: Tensor) -> dict[str, Tensor]:
            def forward(values: dict[str, Tensor]) -> Tensor:
                placed = {self.places[name]: value for name, value in values.items()}
                y: Tensor = functional_call(self.module, placed, (x.unsqueeze(0),))
                return y

            found: dict[str, Tensor] = vjp(forward, values)[1](g.unsqueeze(0))[0]
            return found

        with warnings.catch_warnings():
            # Of operations that vmap itself runs row by row.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            gradients: dict[str, Tensor] = vmap(of_row)(x, g)
        return gradients

    def _row(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        parameters = [self.module.get_parameter(place) for place in self.places.values()]
        with torch.enable_grad():
            y = self.module(x.unsqueeze(0))
        found = torch.autograd.grad(y, parameters, g.unsqueeze(0), allow_unused=True)
        return {
            name: torch.zeros_like(parameter) if gradient is None else gradient
            for name, parameter, gradient in zip(self.places, parameters, found, strict=True)
        }
