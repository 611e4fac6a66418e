"""Open a data set and load its splits, from the hub, local files or installed packages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict

from fish_tuning.experiments.config.dataset import DatasetConfig
from fish_tuning.experiments.data.files import find_files, read_file
from fish_tuning.experiments.errors import ConfigError, first_line

Splits = Mapping[str, Callable[[], Dataset]]
"""A function per split that loads it."""

_VALIDATION_SPLITS = ("validation", "dev", "valid", "val", "validation_matched")


def open_splits(config: DatasetConfig) -> Splits:
    """Find the splits of a data set. Local files are read only when their split is loaded.

    Raises:
        ConfigError: There is no such data set.
    """
    if config.load_args is not None:
        loaded = _load_with_datasets(datasets.load_dataset, config.load_args, "load_args")
    elif config.path is None:
        from fish_tuning.experiments.data.installed_text import load_installed_text

        loaded = load_installed_text()
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
    usual = (name for name in _VALIDATION_SPLITS if name in splits and name != config.train_split)
    return config.validation_split or next(usual, None)


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
