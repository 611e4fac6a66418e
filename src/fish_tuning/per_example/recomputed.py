"""Per-example gradients of modules without a closed form: their forward runs again.

An adapter layer computes y = f(theta, x) from a batch x, with an f that differs between methods.
Given the gradient g of its output, the gradient of example b is the vector-Jacobian product

    (d f(theta, x_b) / d theta)^T g_b,

which takes one forward and backward pass of f alone: for all examples at once under
torch.func.vmap, or one by one if f has an operation that vmap does not support.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from fish_tuning.engines import is_away, is_in_zero_3
from fish_tuning.parts import is_divided
from fish_tuning.per_example.errors import OnePassError
from fish_tuning.per_example.memory import is_out_of_memory

logger = logging.getLogger(__name__)


class Recomputed:
    """A module that runs again, and the parameters in it whose gradients are wanted.

    Args:
        module: Takes one tensor, whose first axis is the batch, and returns one tensor.
        parameters: All parameters whose gradients are wanted, by their names in the model.

    Attributes:
        local_names: For those in the module: name in the model -> name in the module.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self._module = module
        names = {id(parameter): name for name, parameter in parameters.items()}
        self.local_names = {
            names[id(parameter)]: local_name
            for local_name, parameter in module.named_parameters()
            if id(parameter) in names
        }
        self._divided: dict[str, Any] = {
            name: p for name, p in module.named_parameters() if is_in_zero_3(p)
        }
        self._whole: dict[str, Tensor] = {}
        self._with_vmap = True

    @property
    def entries(self) -> int:
        """The entries of the module's parameters, of which vmap may hold a copy per example."""
        return sum(getattr(p, "ds_numel", p.numel()) for p in self._module.parameters())

    def gradients(self, x: Tensor, g: Tensor, autocast: torch.dtype | None) -> dict[str, Tensor]:
        """The gradients by the parameters' names in the model, (b, *shape of the parameter).

        Args:
            x: The module's inputs, (b, ...).
            g: The gradients of its outputs, (b, ...).
            autocast: The dtype that autocast was set to in the forward pass, if it was on.
        """
        with (
            self._gathered(),
            torch.autocast(
                x.device.type, autocast, enabled=autocast is not None, cache_enabled=False
            ),
        ):
            if self._with_vmap:
                try:
                    return self._of_all(x, g)
                except (RuntimeError, ValueError) as error:
                    if is_out_of_memory(error):
                        raise
                    reason = str(error).partition("\n")[0]
                    kind = type(self._module).__name__
                    logger.info("%s is recomputed row by row: %s", kind, reason)
                    self._with_vmap = False
            single = [self._of_one(*row) for row in zip(x, g, strict=True)]
        return {name: torch.stack([found[name] for found in single]) for name in self.local_names}

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """Inside the block, there are whole weights where DeepSpeed ZeRO-3 has divided them.

        The module runs with plain tensors in their place: neither DeepSpeed nor PEFT, which
        gathers the weights of DoRA itself, could exchange anything under torch.func's transforms.
        """
        away = list(filter(is_away, self._divided.values()))
        if away:
            away[0].all_gather(away)
        self._whole = {name: p.data for name, p in self._divided.items()}
        try:
            yield
        finally:
            self._whole = {}
            if away:
                away[0].partition(away)

    def _values(self) -> dict[str, Tensor]:
        """The parameters by their names in the model, apart from the graph of the batch."""
        values = {
            name: self._module.get_parameter(local_name).detach()
            for name, local_name in self.local_names.items()
        }
        if any(map(is_divided, values.values())):
            raise OnePassError(
                f"{next(iter(values))} is used in modules that fully_shard completes at different "
                "times"
            )
        return values

    def _forward(self, values: Mapping[str, Tensor], x: Tensor) -> Tensor:
        local = {self.local_names[name]: value for name, value in values.items()} | self._whole
        y: Tensor = functional_call(self._module, local, (x.unsqueeze(0),))
        return y

    def _of_all(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        values = self._values()

        def of_one(x: Tensor, g: Tensor) -> dict[str, Tensor]:
            found: dict[str, Tensor] = vjp(lambda v: self._forward(v, x), values)[1](
                g.unsqueeze(0)
            )[0]
            return found

        with warnings.catch_warnings():
            # About operations that vmap itself runs one by one.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            gradients: dict[str, Tensor] = vmap(of_one)(x, g)
        return gradients

    def _of_one(self, x: Tensor, g: Tensor) -> dict[str, Tensor]:
        # Leaves of their own: hooks on the parameters are for the gradients of the batch.
        values = {name: value.requires_grad_() for name, value in self._values().items()}
        with torch.enable_grad():
            y = self._forward(values, x)
        found = torch.autograd.grad(y, [*values.values()], g.unsqueeze(0), allow_unused=True)
        return {
            name: torch.zeros_like(value) if gradient is None else gradient
            for (name, value), gradient in zip(values.items(), found, strict=True)
        }
