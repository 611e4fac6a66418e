"""Reading a model's outputs: the loss and the logits, by name or by position."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def loss_of(outputs: Any) -> Tensor | None:
    """The model's own loss, if there is one: `loss`, or the first item of a tuple (a scalar)."""
    if _is_plain_sequence(outputs):
        return outputs[0] if outputs and _is_scalar(outputs[0]) else None
    loss = _named(outputs, "loss")
    return loss if isinstance(loss, Tensor) else None


def logits_of(outputs: Any) -> Any:
    """The logits: `logits`, the output itself, or the first item of a tuple that is no loss."""
    if isinstance(outputs, Tensor):
        return outputs
    if _is_plain_sequence(outputs):
        rest = outputs[1:] if loss_of(outputs) is not None else outputs
        # Without labels a module of one's own may return (None, logits).
        rest = [item for item in rest if item is not None]
        return rest[0] if rest else None
    return _named(outputs, "logits")


def _is_plain_sequence(outputs: Any) -> bool:
    return isinstance(outputs, list | tuple) and not hasattr(outputs, "_fields")


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0


def _named(outputs: Any, name: str) -> Any:
    # Before transformers 5, a field that a hook sets on an output is an attribute, not an item.
    value = getattr(outputs, name, None)
    return outputs.get(name) if value is None and isinstance(outputs, Mapping) else value
