"""Why one backward pass may not give the gradient of each example."""

from collections.abc import Iterable

from torch import nn


class OnePassError(Exception):
    """One backward pass cannot give this model's per-example gradients; the message says why.

    Args:
        message: Which parameter, and why.
        modules: The modules whose gradients are missing or wrong.
    """

    def __init__(self, message: str, modules: Iterable[nn.Module] = ()) -> None:
        super().__init__(message)
        self.modules = list(modules)
