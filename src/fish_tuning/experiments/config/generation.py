"""The sections that only language models have: `generation` and further data to evaluate on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from fish_tuning.experiments.config.sections import Section
from fish_tuning.experiments.config.source import DataSource
from fish_tuning.experiments.config.text_form import TextForm
from fish_tuning.experiments.config.values import Positive, Text, distinct


def _pattern(value: str) -> str:
    try:
        groups = re.compile(value).groups
    except re.error as error:
        raise ValueError(f"{value!r} is not a valid regular expression: {error}") from None
    if groups > 1:
        raise ValueError(f"{value!r} has {groups} groups; put the answer in one, or in none")
    return value


class GenerationConfig(Section):
    """Texts that the trained model generates from the prompts of the validation split."""

    metrics: Annotated[
        list[Literal["exact_match", "bleu", "rouge_l"]], AfterValidator(distinct)
    ] = Field(
        default=[],
        description="How texts are compared with the data's completions, of which a prompt may "
        "have several: by the answer (exact_match), by sacrebleu's corpus BLEU from 0 to 100 "
        "(bleu), or by rouge-score's ROUGE-L from 0 to 1 (rouge_l). None just keeps the texts.",
    )
    answer_pattern: Annotated[Text, AfterValidator(_pattern)] | None = Field(
        default=None,
        description="Regular expression of the answer that exact_match compares, such as "
        r"`#### (-?[\d.,]+)`: the group of its first match. By default the whole text.",
    )
    max_new_tokens: Positive = Field(default=64, description="Longest generated text, in tokens.")
    num_beams: Positive = Field(default=1, description="Number of beams; 1 is greedy.")
    batch_size: Positive | None = Field(
        default=None,
        description="Prompts per batch; by default per_device_eval_batch_size.",
    )
    max_prompts: Positive | None = Field(
        default=None,
        description="Generate from this many different prompts, the first ones; by default all.",
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """A pattern that nothing compares."""
        if self.answer_pattern is not None and "exact_match" not in self.metrics:
            yield "answer_pattern", "is for exact_match; add that to generation.metrics"


class EvaluationSetConfig(TextForm, DataSource):
    """Data that a language model is evaluated on: where it is, its form, and how much of it."""

    split: Text | None = Field(
        default=None,
        description="The split to evaluate on; by default the one named validation or dev, or else "
        "test, or else train.",
    )
    max_samples: Positive | None = Field(
        default=None,
        description="Evaluate on this many examples, drawn at random; by default on all.",
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """More than one text column."""
        yield from super().conflicts()
        if self.text_column is not None and len(self.text_column) > 1:
            yield "text_column", f"{self.text_column}: a language model reads one column; name it"


SetName = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]
"""The name of an evaluation set, which becomes part of the names of its metrics."""
