"""The section `lora`, and the adapters of other PEFT methods."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from fish_tuning.experiments.config.sections import Section
from fish_tuning.experiments.config.training_args import peft_methods
from fish_tuning.experiments.config.values import Positive, Text


def _regexes(values: list[str]) -> list[str]:
    for value in values:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{value!r} is not a valid regular expression: {error}") from None
    return values


def _peft_method(value: str) -> str:
    known = peft_methods()
    if value.upper() not in known:
        near = difflib.get_close_matches(value.upper(), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        raise ValueError(f"is not a method of the installed PEFT; {hint}")
    return value.upper()


class LoraConfig(Section):
    """The adapters."""

    baseline_rank: Positive = Field(
        default=8, description="Rank of the LoRA baseline, whose size is the unit of all budgets."
    )
    fish_rank: Positive = Field(
        default=16, description="Rank of the adapter that FISH selects entries from."
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Dropout before the adapters."
    )
    target_modules: list[str] | str | None = Field(
        default=None,
        description="Modules that get an adapter: a list of names, or one string that is a regular "
        "expression or `all-linear`; by default what PEFT chooses for the model.",
    )
    names_to_exclude: Annotated[list[str], AfterValidator(_regexes)] = Field(
        default=["classifier", "score"],
        description="Regular expressions of parameters that are trained densely; they count in "
        "the budget. The default is the classification head.",
    )


class AdapterConfig(Section):
    """A PEFT method and its arguments."""

    method: Annotated[str, AfterValidator(_peft_method)] = Field(
        description="A method of the installed PEFT, such as ADALORA, SHIRA, VERA, IA3 or LOKR."
    )
    config: dict[str, Any] = Field(
        default={}, description="Arguments of the method's PEFT config, such as r."
    )


class PeerConfig(AdapterConfig):
    """Another PEFT method to compare with."""

    name: Text | None = Field(
        default=None, description="Name in the results; by default the method's."
    )

    @property
    def label(self) -> str:
        """The arm's name in the results."""
        return self.name or self.method
