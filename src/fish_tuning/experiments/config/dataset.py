"""The section `dataset`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from fish_tuning.experiments.config.sections import Section
from fish_tuning.experiments.config.values import Name, NameList, Names, Positive, Text
from fish_tuning.experiments.metrics import KNOWN_METRICS, Task
from fish_tuning.experiments.tasks import KnownTask, known_task

INSTALLED_TEXT = "installed_text"
"""The `dataset.name` of sentences from the documentation of installed packages."""


def _metric(value: str) -> str:
    if value not in KNOWN_METRICS:
        raise ValueError(f"is not a known metric; use one of {', '.join(KNOWN_METRICS)}")
    return value


class DatasetConfig(Section):
    """The data: a hub data set, local files, or the packaged sentences."""

    name: Text | None = Field(
        default=None,
        description="Name for reports; a GLUE task's name also chooses its metric and columns. "
        "`installed_text` alone is the data set of documentation sentences.",
    )
    load_args: NameList | None = Field(
        default=None, description='Arguments of datasets.load_dataset, such as ["glue", "mrpc"].'
    )
    path: Text | dict[str, str] | None = Field(
        default=None,
        description="Local data, relative to the current folder: a file, a mapping of split to "
        "file, a folder that holds train.* and dev.* or validation.*, or a folder written by "
        "save_to_disk.",
    )
    format: Literal["csv", "tsv", "json", "jsonl", "parquet"] | None = Field(
        default=None, description="Format of local files; by default the one of their extension."
    )
    columns: Names | None = Field(
        default=None, description="Column names of CSV or TSV files that have no header line."
    )
    header: bool | None = Field(
        default=None,
        description="Whether CSV and TSV files start with a header line; by default they do unless "
        "`columns` is given. Without both, columns are named 0, 1, 2...",
    )
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = Field(
        default=None, description="Delimiter of CSV and TSV files; by default a comma or a tab."
    )
    quoting: bool | None = Field(
        default=None,
        description="Whether quotation marks enclose fields; by default in CSV, not in TSV.",
    )
    text_column: Names | None = Field(
        default=None,
        description="The text column, or a list of two for sentence pairs; by default those of the "
        "task, or those whose type is text.",
    )
    label_column: Name | None = Field(
        default=None, description="The label column; by default the one named label or similar."
    )
    train_split: str = Field(default="train", description="The split to train on.")
    validation_split: str | None = Field(
        default=None,
        description="The split to evaluate on; by default the one named validation or dev, or else "
        "a fraction of the training split.",
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
        "classification.",
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
        description=f"The main metric, one of {', '.join(KNOWN_METRICS)}; by default the task's.",
    )

    @property
    def known_task(self) -> KnownTask | None:
        """The public task that `load_args` or `name` stands for."""
        return known_task([*reversed(self.load_args or []), self.name])

    @property
    def known_num_labels(self) -> int | None:
        """The number of outputs, if it is known without reading the data."""
        if self.task == "regression":
            return 1
        if self.label_names is not None:
            return len(self.label_names)
        if self.num_labels is None and self.load_args and self.known_task:
            return self.known_task.num_labels
        return self.num_labels

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Keys that exclude each other or contradict the task."""
        yield from self._conflicts_of_files()
        yield from self._conflicts_of_columns()
        yield from self._conflicts_of_task()

    def _conflicts_of_files(self) -> Iterator[tuple[str, str]]:
        if self.load_args is not None and self.path is not None:
            yield "path", "is given beside load_args; keep one and set the other to null"
        if self.load_args is None and self.path is None and self.name != INSTALLED_TEXT:
            yield "load_args", f"names no data; give load_args, path, or name: {INSTALLED_TEXT}"
        if self.path is None:
            for key in ("format", "columns", "header", "delimiter", "quoting"):
                if getattr(self, key) is not None:
                    yield key, "is for local files and dataset.path is not given; remove it"
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

    def _conflicts_of_task(self) -> Iterator[tuple[str, str]]:
        if self.task and self.metric and KNOWN_METRICS[self.metric] != self.task:
            fitting = [name for name, task in KNOWN_METRICS.items() if task == self.task]
            yield (
                "metric",
                f"{self.metric!r} does not measure {self.task}; use one of {', '.join(fitting)}",
            )
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
