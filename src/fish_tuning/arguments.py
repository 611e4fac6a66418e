"""Arguments of the wrong type or value, refused in one sentence that says what to give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any


def check_type(name: str, value: object, kind: type | tuple[type, ...], wanted: str) -> None:
    """Check that an argument has the right type.

    Args:
        name: The argument.
        value: What was given.
        kind: What it has to be.
        wanted: What to give, for the message.

    Raises:
        TypeError: It has another type.
    """
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is Integral):
        shown = f" {value!r}" if isinstance(value, str | int | float) else ""
        raise TypeError(f"{name} is a {type(value).__name__}{shown}: give {wanted}")


def check_integer(name: str, value: object, lowest: int | None = None) -> None:
    """Check that an argument is an integer, and not below the lowest allowed value.

    Raises:
        TypeError: It is not an integer.
        ValueError: It is too low.
    """
    check_type(name, value, Integral, "an integer")
    if lowest is not None and isinstance(value, Integral) and value < lowest:
        raise ValueError(f"{name}={value}: must be at least {lowest}")


def check_scores(name: str, value: object) -> None:
    """Check that an argument is a mapping, as scores are.

    Raises:
        TypeError: It is something else.
    """
    wanted = "a dict of tensors by parameter name, as calculate_fisher_information returns it"
    if isinstance(value, str):
        wanted += ", or FishScores.from_pretrained of that folder"
    check_type(name, value, Mapping, wanted)


def check_mask(name: str, value: Any) -> None:
    """Check that an argument is a mapping, as masks are.

    Raises:
        TypeError: It is something else.
    """
    wanted = "a FishMask, or a dict of boolean tensors by parameter name"
    if isinstance(value, str) or hasattr(value, "__fspath__"):
        wanted = f"FishMask.from_pretrained({str(value)!r})"
    check_type(name, value, Mapping, wanted)


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Check that an argument has one of its allowed values.

    Args:
        name: The argument.
        value: What was given.
        allowed: The values.

    Raises:
        ValueError: It has another value.
    """
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, allowed))}")
