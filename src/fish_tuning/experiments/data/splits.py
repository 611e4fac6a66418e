"""Open a data set and load its splits, from the hub, local files or installed packages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, DatasetDict

from fish_tuning.experiments.config.dataset import DatasetConfig
from fish_tuning.experiments.config.source import INSTALLED_TEXT, DataSource
from fish_tuning.experiments.data.files import find_files, read_file
from fish_tuning.experiments.errors import ConfigError, first_line

Splits = Mapping[str, Callable[[], Dataset]]
"""A function per split that loads it."""

_VALIDATION_SPLITS = ("validation", "dev", "valid", "val", "validation_matched")


def open_splits(config: DataSource) -> Splits:
    """Find the splits of a data set. Local files are read only when their split is loaded.

    Raises:
        ConfigError: There is no such data set.
    """
    if config.load_args is not None:
        loaded = _load_with_datasets(datasets.load_dataset, config.load_args, "load_args")
    elif config.path is None:
        loaded = _load_installed(config.name or INSTALLED_TEXT)
    elif isinstance(config.path, str) and _is_saved_dataset(Path(config.path)):
        loaded = _load_with_datasets(datasets.load_from_disk, [config.path], "path")
    else:
        files = find_files(config.path, config.format)
        return {name: partial(read_file, file, config) for name, file in files.items()}
    if not isinstance(loaded, DatasetDict):
        loaded = {"train": loaded}
    return {name: partial(loaded.__getitem__, name) for name in loaded}


def find_validation_split(splits: Splits, config: DatasetConfig) -> str | None:
    """Return the validation split: the configured one, or one with a usual name, or None."""
    return config.validation_split or usual_validation_split(splits, config.train_split)


def usual_validation_split(splits: Splits, train_split: str = "train") -> str | None:
    """Return the split whose name is usual for validation, or None."""
    usual = (name for name in _VALIDATION_SPLITS if name in splits and name != train_split)
    return next(usual, None)


def train_and_validation(
    splits: Splits,
    config: DatasetConfig,
    train: Dataset,
    *,
    prepare: Callable[[Dataset, str], Dataset],
    divide: Callable[[Dataset, int], tuple[Dataset, Dataset]],
    seed: int,
) -> tuple[Dataset, Dataset]:
    """Find the examples to train and to evaluate on, and take as many as the config asks for.

    Args:
        splits: What `open_splits` returned.
        config: Where the data is and what to take from it.
        train: The prepared training split.
        prepare: Prepares a split in the same way; called with it and its name.
        divide: Splits that many examples off if there is no validation split.
        seed: Chooses the subsets.

    Raises:
        ConfigError: There is no such split, or one of them would be empty.
    """
    validation_split = find_validation_split(splits, config)
    if validation_split is not None:
        validation = load_split(splits, validation_split, "validation_split")
        validation = prepare(validation, validation_split)
    else:
        size = round(config.validation_fraction * len(train))
        if not 0 < size < len(train):
            raise ConfigError(
                f"dataset.validation_fraction: {config.validation_fraction} of {len(train)} "
                "examples leaves a split empty; change it or name a validation_split"
            )
        train, validation = divide(train, size)
    train = subset(train, config.max_train_samples, seed)
    return train, subset(validation, config.max_validation_samples, seed)


def subset(data: Dataset, size: int | None, seed: int) -> Dataset:
    """Draw some of the examples at random, in their order; all if there is no size."""
    if size is None or size >= len(data):
        return data
    return data.select(np.sort(np.random.default_rng(seed).permutation(len(data))[:size]))


def _load_installed(name: str) -> DatasetDict:
    """Make one of the data sets that consist of what is installed."""
    if name == INSTALLED_TEXT:
        from fish_tuning.experiments.data.installed.text import load_installed_text

        return load_installed_text()
    from fish_tuning.experiments.data.installed.prompts import load_docstrings, load_reference

    return load_docstrings() if name == "installed_docstrings" else load_reference()


def load_split(splits: Splits, name: str, key: str) -> Dataset:
    """Load one split.

    Args:
        splits: What `open_splits` returned.
        name: The split to load.
        key: The key of the config that names it, for messages.

    Raises:
        ConfigError: There is no such split, it cannot be read, or it has no rows.
    """
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


def _load_with_datasets(load: Callable[..., Any], args: list[str], key: str) -> Any:
    try:
        return load(*args)
    # The hub's clients, loading scripts and Arrow have no common base class for their errors.
    except Exception as error:
        raise ConfigError(
            f"dataset.{key}: {args} cannot be loaded: {type(error).__name__}: {first_line(error)}; "
            "check the name and the network, or use dataset.path for local data"
        ) from error


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
