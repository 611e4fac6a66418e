"""Optimizers that were built before their model was masked."""

from collections.abc import Mapping
from itertools import repeat
from typing import Any

from torch import nn


def parameter_names(model: nn.Module) -> dict[int, str]:
    """The name of each parameter, by its id."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def follow_mask(optimizer: Any, names: Mapping[int, str], model: nn.Module) -> None:
    """Replaces masked parameters in an optimizer by their values, group by group.

    Parameters of which nothing is selected leave it. Learning rates, weight decay and schedulers
    stay as they are.

    Args:
        optimizer: An optimizer that has made no step.
        names: `parameter_names(model)` from before the model was masked.
        model: The masked model.
    """
    parameters = dict(model.named_parameters())

    def followed(parameter: nn.Parameter) -> nn.Parameter | None:
        name = names.get(id(parameter))
        if name is None:  # Of a loss that has weights of its own.
            return parameter
        return parameters.get(name)

    for group in optimizer.param_groups:
        names_of_group = group.get("param_names", repeat(None))
        pairs = list(zip(map(followed, group["params"]), names_of_group, strict=False))
        group["params"] = [parameter for parameter, _ in pairs if parameter is not None]
        if "param_names" in group:
            group["param_names"] = [name for parameter, name in pairs if parameter is not None]
