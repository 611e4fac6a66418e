"""Load the examples of a task, ready for training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from datasets import ClassLabel, Dataset

from fish_tuning.experiments.config.dataset import DatasetConfig
from fish_tuning.experiments.data.columns import (
    column,
    find_label_column,
    find_text_columns,
    has_label_column,
    has_several_words,
)
from fish_tuning.experiments.data.labels import LabelSpace, find_label_space
from fish_tuning.experiments.data.splits import load_split, open_splits, train_and_validation
from fish_tuning.experiments.data.text_forms import COMPLETIONS, refuse_texts_to_generate
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.metrics.names import Task, metric_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskData:
    """A task's examples and what is known about them.

    Attributes:
        train: Text columns as text, labels as class ids or floats; no other columns.
        validation: The same for evaluation.
        text_columns: One or two.
        label_column: The column with the labels.
        task: Classification or regression.
        label_names: The classes in the order of their ids; empty for regression.
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
        config: Where the data is and what to take from it.
        seed: Chooses the held-out share and the subsets. It does not depend on a run's seed: all
            runs of an experiment see the same examples.

    Raises:
        ConfigError: The data cannot be loaded or does not fit the config.
    """
    splits = open_splits(config)
    train = load_split(splits, config.train_split, "train_split")
    if config.label_column is None and not has_label_column(train, config):
        refuse_texts_to_generate(train.column_names)
    label_column = find_label_column(train, config)
    if label_column in COMPLETIONS and has_several_words(column(train, label_column)):
        refuse_texts_to_generate(train.column_names)
    text_columns = find_text_columns(train, config, label_column)
    where = _where(label_column, config.train_split)
    feature = train.features[label_column]
    class_names = feature.names if isinstance(feature, ClassLabel) else None
    space = find_label_space(column(train, label_column), config, where, class_names)
    train = _encode(train, config.train_split, text_columns, label_column, space)

    def prepare(data: Dataset, split: str) -> Dataset:
        _check_columns(data, split, (*text_columns, label_column))
        return _encode(data, split, text_columns, label_column, space)

    train, validation = train_and_validation(
        splits,
        config,
        train,
        prepare=prepare,
        divide=lambda data, size: hold_out(data, label_column, size, space.task, seed),
        seed=seed,
    )
    if len(set(column(train, label_column))) < 2:
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
    """Split off some of the examples; of classification, the same share of each class.

    Args:
        train: The examples.
        label_column: The column with the labels; only classification reads it.
        size: How many examples to split off; fewer than there are.
        task: What the model predicts.
        seed: Chooses the examples.

    Returns:
        The examples that stay, and those split off.
    """
    generator = np.random.default_rng(seed)
    rows = generator.permutation(len(train))
    groups = [rows]
    if task == "classification":
        labels = np.asarray(column(train, label_column))
        groups = [rows[labels[rows] == label] for label in generator.permutation(np.unique(labels))]
    # An example's position within its class, from 0 to 1. The lowest positions of all classes
    # together are the same share of each class.
    positions = np.concatenate([(np.arange(len(group)) + 0.5) / len(group) for group in groups])
    chosen = np.sort(np.concatenate(groups)[np.argsort(positions, kind="stable")[:size]])
    others = np.setdiff1d(np.arange(len(train)), chosen)
    return train.select(others), train.select(chosen)


def tokenize(
    data: TaskData, tokenizer: PreTrainedTokenizerBase, max_seq_length: int
) -> tuple[Dataset, Dataset]:
    """Tokenize both splits, truncated but not padded: the collator pads each batch.

    Returns:
        Training and validation examples with the model's inputs and `labels`, nothing else.
    """

    def tokenized(split: Dataset) -> Dataset:
        texts = [column(split, name) for name in data.text_columns]
        inputs = tokenizer(*texts, truncation=True, max_length=max_seq_length)
        return Dataset.from_dict({**inputs, "labels": column(split, data.label_column)})

    return tokenized(data.train), tokenized(data.validation)


def _where(label_column: str, split: str) -> str:
    return f"dataset.label_column {label_column!r} of the split {split!r}"


def _check_columns(validation: Dataset, split: str, used: Sequence[str]) -> None:
    for name in used:
        if name not in validation.column_names:
            raise ConfigError(
                f"dataset.validation_split: {split!r} has no column {name!r}, only "
                f"{', '.join(validation.column_names)}; use the same columns in both splits"
            )


def _encode(
    data: Dataset, split: str, text_columns: Sequence[str], label_column: str, space: LabelSpace
) -> Dataset:
    """Keep the columns that are used: text as text, labels as class ids or floats."""
    columns: dict[str, list[str] | list[int] | list[float]] = {}
    for name in text_columns:
        values = column(data, name)
        for row, value in enumerate(values, start=1):
            if not isinstance(value, str | int | float):
                raise ConfigError(
                    f"dataset.text_column {name!r} of the split {split!r}, row {row}: {value!r} is "
                    "not text; fill it in, remove the row or name another column"
                )
        columns[name] = [str(value) for value in values]
    columns[label_column] = space.encode(column(data, label_column), _where(label_column, split))
    return Dataset.from_dict(columns)
