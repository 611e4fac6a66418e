"""The section `dataset`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, Field

from fish_tuning.experiments.config.generation import EvaluationSetConfig
from fish_tuning.experiments.config.source import DataSource
from fish_tuning.experiments.config.text_form import TextForm
from fish_tuning.experiments.config.values import Name, Names, Positive
from fish_tuning.experiments.metrics.names import CAUSAL_LM, KNOWN_METRICS, Task
from fish_tuning.experiments.tasks import KnownTask, known_task


def _metric(value: str) -> str:
    if value not in KNOWN_METRICS:
        raise ValueError(f"is not a known metric; use one of {', '.join(KNOWN_METRICS)}")
    return value


class DatasetConfig(TextForm, DataSource):
    """The data to train and to evaluate on, and what is predicted."""

    label_column: Name | None = Field(
        default=None, description="The label column; by default the one named label or similar."
    )
    train_split: str = Field(default="train", description="The split to train on.")
    validation_split: str | None = Field(
        default=None,
        description="The split to evaluate on; by default the one named validation or dev, or else "
        "a fraction of the training split.",
    )
    validation: EvaluationSetConfig | None = Field(
        default=None,
        description="Language models: evaluate on other data than that of this section, with its "
        "own columns or templates.",
    )
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.1,
        description="Fraction of the training split to hold out if there is no validation split.",
    )
    max_train_samples: Positive | None = Field(
        default=None, description="Train on this many examples, drawn at random; by default on all."
    )
    max_validation_samples: Positive | None = Field(
        default=None,
        description="Evaluate on this many examples, drawn at random; by default on all.",
    )
    task: Task | None = Field(
        default=None,
        description="By default regression if labels have a fractional part, otherwise "
        "classification; causal_lm for a language model that learns to continue text.",
    )
    num_labels: Positive | None = Field(
        default=None, description="Number of classes; by default counted in the training split."
    )
    label_names: Names | None = Field(
        default=None,
        description="Class names in the order of their ids; by default those of the training "
        "split, sorted.",
    )
    metric: Annotated[str, AfterValidator(_metric)] | None = Field(
        default=None,
        description=f"The main metric, one of {', '.join(KNOWN_METRICS)}; by default the task's. "
        "Those of generated texts are set under generation.metrics.",
    )

    @property
    def known_task(self) -> KnownTask | None:
        """The public task that `load_args` or `name` stands for."""
        return known_task([*reversed(self.load_args or []), self.name])

    @property
    def known_num_labels(self) -> int | None:
        """The number of labels, if it is known without reading the data; 0 for language models."""
        if self.task == CAUSAL_LM:
            return 0
        if self.task == "regression":
            return 1
        if self.label_names is not None:
            return len(self.label_names)
        if self.num_labels is None and self.load_args and self.known_task:
            return self.known_task.num_labels
        return self.num_labels

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Keys that exclude each other or contradict the task."""
        yield from super().conflicts()
        yield from self._conflicts_of_splits()
        yield from self._conflicts_of_columns()
        if self.task == CAUSAL_LM:
            yield from self._conflicts_of_language_models()
        else:
            yield from self._conflicts_of_labels()

    def _conflicts_of_splits(self) -> Iterator[tuple[str, str]]:
        if isinstance(self.path, dict) and self.train_split not in self.path:
            yield (
                "path",
                f"has no {self.train_split!r} among its splits {list(self.path)}; add it or set "
                "dataset.train_split",
            )
        if self.train_split == self.validation_split:
            yield "validation_split", "is the training split; leave it out to hold out a share"

    def _conflicts_of_columns(self) -> Iterator[tuple[str, str]]:
        if self.text_column is not None and len(self.text_column) > 2:
            yield "text_column", f"{self.text_column} has more than two columns; name one or two"
        if self.text_column is not None and self.label_column in self.text_column:
            yield "label_column", f"{self.label_column!r} is a text column too; name another"
        if self.task is None and self.metric and KNOWN_METRICS[self.metric] == CAUSAL_LM:
            yield "metric", f"{self.metric!r} is for language models; set dataset.task: {CAUSAL_LM}"
        if self.task and self.metric and KNOWN_METRICS[self.metric] != self.task:
            fitting = [name for name, task in KNOWN_METRICS.items() if task == self.task]
            yield (
                "metric",
                f"{self.metric!r} does not measure {self.task}; use one of {', '.join(fitting)}",
            )

    def _conflicts_of_language_models(self) -> Iterator[tuple[str, str]]:
        if self.validation is not None:
            for key in ("validation_split", "max_validation_samples"):
                if getattr(self, key) is not None:
                    yield key, "is given beside dataset.validation; set it there, or remove it"
        for key in ("label_column", "num_labels", "label_names"):
            if getattr(self, key) is not None:
                yield key, f"is for classification and dataset.task is {CAUSAL_LM}; remove it"
        if self.text_column is not None and len(self.text_column) > 1:
            yield "text_column", f"{self.text_column}: a language model reads one column; name it"

    def _conflicts_of_labels(self) -> Iterator[tuple[str, str]]:
        for key in [*self.own_keys, *(["validation"] if self.validation else [])]:
            yield key, f"is for language models; set dataset.task: {CAUSAL_LM}, or remove it"
        if self.task == "regression":
            for key in ("num_labels", "label_names"):
                if getattr(self, key) is not None:
                    yield key, "is for classification and dataset.task is regression; remove it"
        elif self.num_labels == 1 or (self.label_names and len(self.label_names) == 1):
            yield (
                "num_labels",
                "1 class leaves nothing to predict; give 2 or more, or task: regression",
            )
        elif self.num_labels and self.label_names and self.num_labels != len(self.label_names):
            yield (
                "num_labels",
                f"{self.num_labels} contradicts the {len(self.label_names)} label_names; remove it",
            )
