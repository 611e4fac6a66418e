"""Find the text columns and the label column of a data set."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from fish_tuning.experiments.config.dataset import DatasetConfig
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.tasks import KNOWN_TASKS

_LABEL_COLUMNS = ("label", "labels", "quality", "target", "class", "gold_label", "score")
_ID_COLUMN = re.compile(r"(?:^|[\W_])(?:id|idx|index|guid|uuid)$", re.IGNORECASE)
_SAMPLE_SIZE = 200


def find_label_column(train: Dataset, config: DatasetConfig) -> str:
    """Return the label column: the configured one, or the first with a usual name.

    Raises:
        ConfigError: There is no such column.
    """
    if config.label_column is not None:
        return _existing(config.label_column, train, "label_column")
    named = _named_like_labels(train, config)
    if named:
        return named[0]
    hint = ", or set dataset.header: false or dataset.columns if the file has no header line"
    raise ConfigError(
        f"dataset.label_column: none of the columns {', '.join(train.column_names)} has a usual "
        f"name of labels, such as label; name the column, or set dataset.task: causal_lm if a "
        f"language model is to learn the texts{hint if config.path else ''}"
    )


def has_label_column(train: Dataset, config: DatasetConfig) -> bool:
    """Return whether a column has the usual name of a label."""
    return bool(_named_like_labels(train, config))


def _named_like_labels(train: Dataset, config: DatasetConfig) -> list[str]:
    by_name = {name.lower(): name for name in train.column_names}
    return [
        by_name[name]
        for name in _LABEL_COLUMNS
        if name in by_name and by_name[name] not in (config.text_column or ())
    ]


def find_text_columns(train: Dataset, config: DatasetConfig, label: str) -> tuple[str, ...]:
    """Return the one or two text columns.

    They are the configured ones, or else those of a public task, or else the columns of strings
    that mostly have several words.

    Raises:
        ConfigError: There is no such column, or the columns do not show which ones are meant.
    """
    if config.text_column is not None:
        return tuple(_existing(name, train, "text_column") for name in config.text_column)
    tasks = [*([config.known_task] if config.known_task else []), *KNOWN_TASKS.values()]
    # Pairs first: data with sentence1 and sentence2 may also have a column called text.
    for task in sorted(tasks, key=lambda task: -len(task.text_columns)):
        if set(task.text_columns) <= set(train.column_names) - {label}:
            return task.text_columns
    sample = train.select(range(min(_SAMPLE_SIZE, len(train))))
    strings = [
        name
        for name in train.column_names
        if name != label
        and getattr(train.features[name], "dtype", None) in ("string", "large_string")
        and not _ID_COLUMN.search(name)
    ]
    # IDs, sources and tags are strings too, but of a single word.
    found = [name for name in strings if has_several_words(column(sample, name))] or strings
    if not 1 <= len(found) <= 2:
        raise ConfigError(
            f"dataset.text_column: {'several' if found else 'none'} of the columns could be the "
            f"text: {', '.join(found or train.column_names)}; name one, or two for sentence pairs"
        )
    return tuple(found)


def column(data: Dataset, name: str) -> list[Any]:
    """Return the values of a column."""
    values: list[Any] = data[name][:]
    return values


def has_several_words(values: Sequence[Any]) -> bool:
    """Return whether most values are text of more than one word."""
    return 2 * sum(len(str(value or "").split()) > 1 for value in values) > len(values)


def _existing(name: str, data: Dataset, key: str) -> str:
    if name not in data.column_names:
        near = difflib.get_close_matches(name, data.column_names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"dataset.{key}: there is no column {name!r}, only "
            f"{', '.join(data.column_names)}{hint or '; name one of them'}"
        )
    return name
