"""Data sets from the hub, from local files or packaged, ready for training."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict

from fish_tuning.experiments.config.schema import DatasetConfig
from fish_tuning.experiments.data.files import find_files, read_file
from fish_tuning.experiments.data.labels import LabelSpace, label_space
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.metrics import Task, metric_names
from fish_tuning.experiments.tasks import KNOWN_TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_VALIDATION_SPLITS = ("validation", "dev", "valid", "val", "validation_matched")
_LABEL_COLUMNS = ("label", "labels", "quality", "target", "class", "gold_label", "score")
_ID_COLUMN = re.compile(r"(?:^|[\W_])(?:id|idx|index|guid|uuid)$", re.IGNORECASE)
_ROWS_LOOKED_AT = 200


@dataclass(frozen=True)
class TaskData:
    """A task's examples and what is known about them.

    Attributes:
        train: Text columns as text, labels as class ids or floats; no other columns.
        validation: The same for evaluation.
        text_columns: One or two.
        label_column: The column with the labels.
        task: Classification or regression.
        label_names: The classes in the order of their ids; none for regression.
        num_labels: The number of the model's outputs.
        metrics: Names of the metrics to report, the main one first.
    """

    train: Dataset
    validation: Dataset
    text_columns: tuple[str, ...]
    label_column: str
    task: Task
    label_names: tuple[str, ...]
    num_labels: int
    metrics: tuple[str, ...]


def load_data(config: DatasetConfig, *, seed: int = 42) -> TaskData:
    """Load the training and validation examples of a task.

    Args:
        config: Where they are and what to take.
        seed: Chooses the held-out share and the subsets. It is no run's seed: all runs of an
            experiment see the same examples.

    Raises:
        ConfigError: If the data cannot be loaded or does not fit `config`.
    """
    splits = _open_splits(config)
    train = _take(splits, config.train_split, "train_split")
    validation_name = config.validation_split or next(
        (name for name in _VALIDATION_SPLITS if name in splits and name != config.train_split), None
    )

    label_column = _label_column(train, config)
    text_columns = _text_columns(train, config, label_column)
    used = (*text_columns, label_column)
    where = f"dataset.label_column {label_column!r} of the split {config.train_split!r}"
    labels = _values(train, label_column)
    feature = train.features[label_column]
    space = label_space(
        labels, config, where, feature.names if isinstance(feature, ClassLabel) else None
    )
    train = _encoded(train, config.train_split, text_columns, label_column, space)
    if validation_name is not None:
        validation = _take(splits, validation_name, "validation_split")
        missing = [name for name in used if name not in validation.column_names]
        if missing:
            raise ConfigError(
                f"dataset.validation_split: {validation_name!r} has no column {missing[0]!r}, only "
                f"{', '.join(validation.column_names)}; use the same columns in both splits"
            )
        validation = _encoded(validation, validation_name, text_columns, label_column, space)
    else:
        size = round(config.validation_fraction * len(train))
        if not 0 < size < len(train):
            raise ConfigError(
                f"dataset.validation_fraction: {config.validation_fraction} of {len(train)} "
                "examples leaves a split empty; change it or name a validation_split"
            )
        train, validation = hold_out(train, label_column, size, space.task, seed)
    train = _subset(train, config.max_train_samples, seed)
    validation = _subset(validation, config.max_validation_samples, seed)
    if len(set(_values(train, label_column))) < 2:
        raise ConfigError(
            f"{where}: all {len(train)} training examples have one label, so there is nothing to "
            "learn; name another label_column or raise dataset.max_train_samples"
        )
    logger.info(
        "%s, %d labels: %d training and %d validation examples; text %s, label %s",
        *(space.task, space.num_labels, len(train), len(validation), text_columns, label_column),
    )
    return TaskData(
        train=train,
        validation=validation,
        text_columns=text_columns,
        label_column=label_column,
        task=space.task,
        label_names=space.names,
        num_labels=space.num_labels,
        metrics=metric_names(space.task, space.num_labels, config.metric, config.known_task),
    )


def hold_out(
    train: Dataset, label_column: str, size: int, task: Task, seed: int = 42
) -> tuple[Dataset, Dataset]:
    """Split off examples, of each class the same share.

    Args:
        train: The examples.
        label_column: The column with the labels.
        size: How many to split off, fewer than there are.
        task: Regression has no classes.
        seed: Chooses them.

    Returns:
        The other examples, and those.
    """
    labels = np.asarray(_values(train, label_column))
    generator = np.random.default_rng(seed)
    rows = generator.permutation(len(labels))
    groups = [rows]
    if task == "classification":
        groups = [rows[labels[rows] == label] for label in generator.permutation(np.unique(labels))]
    # Taking the lowest of these, from all classes, takes the same share of each.
    positions = np.concatenate([(np.arange(len(group)) + 0.5) / len(group) for group in groups])
    chosen = np.sort(np.concatenate(groups)[np.argsort(positions, kind="stable")[:size]])
    rest = np.setdiff1d(np.arange(len(labels)), chosen)
    return train.select(rest), train.select(chosen)


def tokenize(
    data: TaskData, tokenizer: PreTrainedTokenizerBase, max_seq_length: int
) -> tuple[Dataset, Dataset]:
    """Tokenise both splits, truncated and not padded: the collator pads each batch.

    Returns:
        Training and validation examples with the model's inputs and `labels`, nothing else.
    """

    def tokenized(split: Dataset) -> Dataset:
        texts = [_values(split, column) for column in data.text_columns]
        inputs = tokenizer(*texts, truncation=True, max_length=max_seq_length)
        return Dataset.from_dict({**inputs, "labels": _values(split, data.label_column)})

    return tokenized(data.train), tokenized(data.validation)


def _open_splits(config: DatasetConfig) -> Mapping[str, Callable[[], Dataset]]:
    """Return a function for each split that loads it."""
    if config.load_args is not None:
        loaded = _foreign(datasets.load_dataset, config.load_args, "load_args")
    elif config.path is None:
        from fish_tuning.experiments.data.installed_text import load_installed_text

        loaded = load_installed_text()
    elif isinstance(config.path, str) and _is_saved(Path(config.path)):
        loaded = _foreign(datasets.load_from_disk, [config.path], "path")
    else:
        files = find_files(config.path, config.format)
        return {name: partial(read_file, file, config) for name, file in files.items()}
    if not isinstance(loaded, DatasetDict):
        loaded = {"train": loaded}
    return {name: partial(loaded.__getitem__, name) for name in loaded}


def _foreign(load: Callable[..., Any], args: list[str], key: str) -> Any:
    try:
        return load(*args)
    # The hub's clients, script loaders and Arrow share no base class for what they raise.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"dataset.{key}: {args} cannot be loaded: {type(error).__name__}: {reason}; check the "
            "name and the network, or use dataset.path for local data"
        ) from error


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _take(splits: Mapping[str, Callable[[], Dataset]], name: str, key: str) -> Dataset:
    if name not in splits:
        remedy = "name one of them"
        if key == "validation_split":
            remedy += ", or leave it out to hold out a share of the training split"
        raise ConfigError(
            f"dataset.{key}: there is no split {name!r}, only {', '.join(splits)}; {remedy}"
        )
    split = splits[name]()
    if not len(split):
        raise ConfigError(f"dataset.{key}: the split {name!r} has no rows; give one with examples")
    return split


def _label_column(train: Dataset, config: DatasetConfig) -> str:
    if config.label_column is not None:
        return _existing(config.label_column, train, "label_column")
    by_name = {name.lower(): name for name in train.column_names}
    for name in _LABEL_COLUMNS:
        if name in by_name and by_name[name] not in (config.text_column or ()):
            return str(by_name[name])
    hint = "; if the file has no header line, set dataset.header: false or dataset.columns"
    raise ConfigError(
        "dataset.label_column: none of the columns has the name of a label: "
        f"{', '.join(train.column_names)}; name the column{hint if config.path else ''}"
    )


def _text_columns(train: Dataset, config: DatasetConfig, label: str) -> tuple[str, ...]:
    """Find the text: as configured, as known of the task or of public data, or by looking."""
    if config.text_column is not None:
        return tuple(_existing(name, train, "text_column") for name in config.text_column)
    tasks = [*([config.known_task] if config.known_task else []), *KNOWN_TASKS.values()]
    # Pairs first: data with sentence1 and sentence2 may have a column called text as well.
    for task in sorted(tasks, key=lambda task: -len(task.text_columns)):
        if set(task.text_columns) <= set(train.column_names) - {label}:
            return task.text_columns
    sample = train.select(range(min(_ROWS_LOOKED_AT, len(train))))
    strings = [
        name
        for name in train.column_names
        if name != label
        and getattr(train.features[name], "dtype", None) in ("string", "large_string")
        and not _ID_COLUMN.search(name)
    ]
    # Ids, sources and marks are strings too; text has several words.
    found = [name for name in strings if _is_wordy(_values(sample, name))] or strings
    if not 1 <= len(found) <= 2:
        raise ConfigError(
            f"dataset.text_column: {'several' if found else 'none'} of the columns could be the "
            f"text: {', '.join(found or train.column_names)}; name one, or two for sentence pairs"
        )
    return tuple(found)


def _is_wordy(values: Sequence[str | None]) -> bool:
    return 2 * sum(len((value or "").split()) > 1 for value in values) > len(values)


def _existing(name: str, data: Dataset, key: str) -> str:
    if name not in data.column_names:
        near = difflib.get_close_matches(name, data.column_names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"dataset.{key}: there is no column {name!r}, only "
            f"{', '.join(data.column_names)}{hint or '; name one of them'}"
        )
    return name


def _values(data: Dataset, column: str) -> list[Any]:
    values: list[Any] = data[column][:]
    return values


def _encoded(
    data: Dataset, split: str, text_columns: Sequence[str], label_column: str, space: LabelSpace
) -> Dataset:
    """Keep what is used: text as text, labels as ids or floats."""
    columns: dict[str, list[Any]] = {}
    for name in text_columns:
        values = _values(data, name)
        for row, value in enumerate(values, start=1):
            if not isinstance(value, str | int | float):
                raise ConfigError(
                    f"dataset.text_column {name!r} of the split {split!r}, row {row}: {value!r} is "
                    "no text; fill it in, remove the row or name another column"
                )
        columns[name] = [str(value) for value in values]
    where = f"dataset.label_column {label_column!r} of the split {split!r}"
    columns[label_column] = list(space.encode(_values(data, label_column), where))
    return Dataset.from_dict(columns)


def _subset(data: Dataset, size: int | None, seed: int) -> Dataset:
    if size is None or size >= len(data):
        return data
    return data.select(np.sort(np.random.default_rng(seed).permutation(len(data))[:size]))
