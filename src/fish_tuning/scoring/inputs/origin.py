"""Whose code computes a model's loss: transformers' own, or that of the caller."""

from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING

_WRAPPERS = {"transformers", "peft", "accelerate", "torch"}
"""Packages whose wrappers of a forward function leave the loss as it is."""


def is_of_transformers(model: Any, base: Any) -> bool:
    """Whether transformers computes the loss, and nothing of the caller's can change it.

    Not if the model is a subclass or a wrapper of the caller's own, if a forward function or the
    loss function was replaced, or if a hook may change the outputs.

    Args:
        model: The model.
        base: The model inside PEFT's wrappers.
    """
    if not isinstance(base, PreTrainedModel) or _package(type(base)) != "transformers":
        return False
    for part in (model, base):
        if _package(type(part)) not in _WRAPPERS or part._forward_hooks:
            return False
        if any(_package(layer) not in _WRAPPERS for layer in _layers(part.forward)):
            return False
    replaced = getattr(base, "_loss_function", None)
    loss = LOSS_MAPPING.get(str(getattr(base, "loss_type", ""))) if replaced is None else replaced
    return loss is None or _package(loss) == "transformers"


def _layers(function: Callable[..., Any] | None) -> Iterator[Callable[..., Any]]:
    """A function, what it wraps, what that wraps, and so on."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _package(value: Any) -> str:
    """The package that a class, a function or an object's class comes from."""
    function = getattr(value, "__func__", value)
    # A wrapper takes over the __module__ of what it wraps, but not its globals.
    code = getattr(function, "__globals__", None)
    if code is not None:
        module = code["__name__"]
    else:
        module = (value if isinstance(value, type) else type(value)).__module__
    return str(module).partition(".")[0]
