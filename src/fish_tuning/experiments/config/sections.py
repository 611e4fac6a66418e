"""What the sections of a config have in common: strict fields, and checks across them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, model_validator


class FieldProblems(ValueError):
    """Several problems in one section of a config.

    Args:
        problems: What is wrong, by the path below that section.
    """

    def __init__(self, problems: Mapping[str, str]) -> None:
        self.problems = dict(problems)
        super().__init__("; ".join(f"{path}: {text}" for path, text in problems.items()))


class Section(BaseModel):
    """A section of a config file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_conflicts(self) -> Self:
        problems = dict(self.conflicts())
        if problems:
            raise FieldProblems(problems)
        return self

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """What is wrong with the section although each of its fields is valid.

        Yields:
            The path below this section, and what is wrong there.
        """
        yield from ()


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field holds, alone or in a list; None if it holds none."""
    for kind in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
