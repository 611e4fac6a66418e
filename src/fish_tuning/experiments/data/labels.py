"""Turn a column of labels, as people write them, into class ids or numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fish_tuning.experiments.config.dataset import DatasetConfig
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.metrics.names import Task

# A column with more rows than this, and more distinct values than this share of them, holds
# something other than classes.
_MIN_ROWS, _MAX_DISTINCT_SHARE = 20, 0.5


@dataclass(frozen=True)
class LabelSpace:
    """What a model predicts, as the training split determines it.

    Attributes:
        task: Classification or regression.
        names: The classes in the order of their ids; empty for regression.
        ids: Class ids by label: by number if all labels are numbers, else by text.
        numeric: Whether labels are compared as numbers.
    """

    task: Task
    names: tuple[str, ...] = ()
    ids: dict[Any, int] | None = None
    numeric: bool = True

    @property
    def num_labels(self) -> int:
        """The number of the model's outputs."""
        return len(self.names) if self.task == "classification" else 1

    def encode(self, values: Sequence[Any], where: str) -> list[int] | list[float]:
        """Turn labels into class ids, or into floats for regression.

        Raises:
            ConfigError: A label is missing, or does not occur in the training split.
        """
        _check_present(values, where)
        keys: Sequence[Any] = values
        if self.numeric:
            numbers = _numbers(values)
            if numbers is None:
                bad = next(i for i, v in enumerate(values) if _numbers([v]) is None)
                raise ConfigError(f"{where}, row {bad + 1}: {values[bad]!r} is not a number")
            keys = numbers
        else:
            keys = [_text(value) for value in values]
        if self.ids is None:
            return [float(key) for key in keys]
        for row, key in enumerate(keys, start=1):
            if key not in self.ids:
                raise ConfigError(
                    f"{where}, row {row}: {values[row - 1]!r} is not among the labels of the "
                    f"training split ({_some(self.names)}); correct it or name another column"
                )
        return [self.ids[key] for key in keys]


def find_label_space(
    values: Sequence[Any], config: DatasetConfig, where: str, class_names: Sequence[str] | None
) -> LabelSpace:
    """Determine from the training labels what the model predicts.

    Numbers with a fractional part mean regression. Other numbers, and text, are classes, whose ids
    follow their sorted order.

    Args:
        values: All labels of the training split.
        config: May set the task, the number of labels and their names.
        where: Split and column, for messages.
        class_names: The names that the data set itself records for the ids 0, 1, 2...

    Raises:
        ConfigError: The labels contradict the config, or cannot be classes.
    """
    _check_present(values, where)
    numbers = None if class_names else _numbers(values)
    fractional = numbers is not None and any(number % 1 for number in numbers)
    if config.task == "regression" or (config.task is None and fractional):
        if numbers is None:
            raise ConfigError(
                f"{where}: dataset.task is regression and {_some(values)} are not numbers; "
                "name another label_column or set dataset.task: classification"
            )
        for key in ("num_labels", "label_names"):
            if getattr(config, key) is not None:
                raise ConfigError(
                    f"dataset.{key}: is for classification, but the labels of {where} have a "
                    "fractional part; remove it or name another label_column"
                )
        return LabelSpace("regression")
    if fractional:
        raise ConfigError(
            f"{where}: labels with a fractional part cannot be classes; "
            "set dataset.task: regression"
        )
    space = _classes(values, numbers, config, class_names)
    if config.num_labels is not None and config.num_labels != space.num_labels:
        raise ConfigError(
            f"dataset.num_labels: is {config.num_labels}, but {where} has {space.num_labels} "
            f"classes ({_some(space.names)}); remove it or correct it"
        )
    if len(values) > _MIN_ROWS and space.num_labels > _MAX_DISTINCT_SHARE * len(values):
        raise ConfigError(
            f"{where}: {space.num_labels} distinct values in {len(values)} rows cannot be classes; "
            "name another label_column, or set dataset.task: regression if they are numbers"
        )
    return space


def _classes(
    values: Sequence[Any],
    numbers: list[float] | None,
    config: DatasetConfig,
    class_names: Sequence[str] | None,
) -> LabelSpace:
    """Assign an id to every class."""
    if class_names:
        names = tuple(config.label_names or class_names)
        return LabelSpace("classification", names, {float(i): i for i in range(len(names))})
    if numbers is not None:
        found = sorted({int(number) for number in numbers})
        expected = len(config.label_names or ()) or config.num_labels or 0
        # Ids that do not occur in this split still count as classes.
        if found[0] >= 0 and found[-1] < expected:
            found = list(range(expected))
        written = [str(number) for number in found]
        if config.label_names is None or set(config.label_names) == set(written):
            order = config.label_names or written
            ids = {float(name): i for i, name in enumerate(order)}
            return LabelSpace("classification", tuple(order), ids)
        if len(found) == len(config.label_names):
            ids = {float(number): i for i, number in enumerate(found)}
            return LabelSpace("classification", tuple(config.label_names), ids)
    named = config.label_names or sorted({_text(value) for value in values})
    return LabelSpace(
        "classification", tuple(named), {name: i for i, name in enumerate(named)}, numeric=False
    )


def _check_present(values: Sequence[Any], where: str) -> None:
    for row, value in enumerate(values, start=1):
        missing = value is None or (isinstance(value, str) and not value.strip())
        if missing or (isinstance(value, float) and not math.isfinite(value)):
            raise ConfigError(
                f"{where}, row {row}: the label is {value!r}; fill it in or remove the row"
            )
        if isinstance(value, list | dict):
            raise ConfigError(
                f"{where}, row {row}: the label {value!r} is a {type(value).__name__}; one label "
                "per example is supported, name another column"
            )
    if values and all(value in (-1, "-1") for value in values):
        raise ConfigError(
            f"{where}: every label is -1, which public test sets have in place of labels; "
            "name another split, or leave dataset.validation_split out to hold out a share"
        )


def _numbers(values: Sequence[Any]) -> list[float] | None:
    """Return labels as numbers, or None if not all of them are finite numbers."""
    try:
        numbers = [float("text" if isinstance(value, bool) else value) for value in values]
    except (TypeError, ValueError):
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


def _some(values: Sequence[Any]) -> str:
    distinct = [repr(value) for value in dict.fromkeys(values)]
    return ", ".join(distinct[:5]) + (", ..." if len(distinct) > 5 else "")
