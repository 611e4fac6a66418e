"""The types of values that several sections of a config share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field


def distinct(values: list[Any]) -> list[Any]:
    """Refuse a list that holds a value twice."""
    twice = sorted({str(value) for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(f"holds {', '.join(twice)} more than once; remove the repetition")
    return values


def _is_name(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def _name(value: Any) -> Any:
    """Accept the number of a column, or a label that is a number, as a name."""
    return str(value) if _is_name(value) else value


def _list_of_names(value: Any) -> Any:
    """Accept a single name as a list of one."""
    values = value if isinstance(value, list) else [value]
    return [str(v) for v in values] if all(map(_is_name, values)) else value


Text = Annotated[str, Field(min_length=1)]
Name = Annotated[Text, BeforeValidator(_name)]
NameList = Annotated[list[Text], Field(min_length=1), BeforeValidator(_list_of_names)]
Names = Annotated[NameList, AfterValidator(distinct)]
Ratio = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Seeds = Annotated[list[Seed], Field(min_length=1), AfterValidator(distinct)]
