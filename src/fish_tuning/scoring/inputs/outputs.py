"""Reading a model's outputs: the loss and the logits, by name or by position."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def loss_of(outputs: Any) -> Tensor | None:
    """The model's own loss, if there is one: `loss`, or a scalar among the first two of a tuple."""
    if _is_plain_sequence(outputs):
        return next(filter(_is_scalar, outputs[:2]), None)
    loss = _named(outputs, "loss")
    return loss if isinstance(loss, Tensor) else None


def loss_is_second(outputs: Any) -> bool:
    """Whether the loss comes after the logits, as from TRL's models with a value head."""
    return _is_plain_sequence(outputs) and len(outputs) > 1 and not _is_scalar(outputs[0])


def logits_of(outputs: Any) -> Any:
    """The logits: `logits`, the output itself, or the first item of a tuple that is no loss."""
    if isinstance(outputs, Tensor):
        return outputs
    if _is_plain_sequence(outputs):
        # Without labels a module of one's own may return (None, logits).
        loss = loss_of(outputs)
        return next((item for item in outputs if item is not None and item is not loss), None)
    return _named(outputs, "logits")


def _is_plain_sequence(outputs: Any) -> bool:
    return isinstance(outputs, list | tuple) and not hasattr(outputs, "_fields")


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0


def _named(outputs: Any, name: str) -> Any:
    # Before transformers 5, a field that a hook sets on an output is an attribute, not an item.
    value = getattr(outputs, name, None)
    return outputs.get(name) if value is None and isinstance(outputs, Mapping) else value
