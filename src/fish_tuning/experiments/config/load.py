"""Load an experiment's config from its YAML file, the base file below it, and overrides."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fish_tuning.experiments.config.original_work import take_original_settings
from fish_tuning.experiments.config.problems import describe
from fish_tuning.experiments.config.schema import ExperimentConfig
from fish_tuning.experiments.config.training_args import DEFAULT_ARGS, rename_old
from fish_tuning.experiments.config.yaml_file import merge, parse_override, read_yaml
from fish_tuning.experiments.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Load an experiment's config.

    Overrides take precedence over the file, and the file over the `base_config.yaml` in its folder
    or the parent folder, if there is one. Mappings are merged at every depth; lists and other
    values are replaced.

    Args:
        path: The experiment's YAML file.
        overrides: Such as `"lora.fish_rank=32"` or `"seeds=[1, 2]"`, with values in YAML.

    Raises:
        ConfigError: The config is wrong; the error lists every problem.
    """
    path = Path(path)
    content = read_yaml(path)
    layers: list[dict[str, Any]] = [
        {
            "training": {"output_dir": f"results/{path.stem}"},
            "base_training": {"args": DEFAULT_ARGS},
        }
    ]
    source = str(path)
    base = _find_base(path)
    if base is not None:
        layers.append(read_yaml(base))
        source += f" (over {base})"
    layers += [content, *map(parse_override, overrides)]

    raw: dict[str, Any] = {}
    problems = []
    for layer in layers:
        take_original_settings(layer)
        # Renamed before merging: the layer below may use the new name.
        problems += _rename_in(layer)
        raw = merge(raw, layer)
    # An empty section counts as left out.
    raw = {key: value for key, value in raw.items() if value is not None}
    try:
        config = ExperimentConfig.model_validate(raw)
    except ValidationError as error:
        problems += describe(error, raw)
    if problems:
        raise ConfigError(problems, source)
    return config


def _find_base(path: Path) -> Path | None:
    """Find the `base_config.yaml` whose values an experiment file overrides."""
    folder = path.absolute().parent
    for candidate in (folder / "base_config.yaml", folder.parent / "base_config.yaml"):
        if candidate.is_file() and candidate != path.absolute():
            return candidate
    return None


def check_output_dir(path: str | Path) -> None:
    """Check, without creating anything, that results can be written to a folder.

    Raises:
        ConfigError: The folder, or the one it would be created in, is a file or not writable.
    """
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ConfigError(
            f"training.output_dir: {str(path)!r} cannot be a folder: {folder} is a file; "
            "choose another"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            f"training.output_dir: {str(path)!r} cannot be written: no permission in {folder}; "
            "choose another"
        )


def _rename_in(raw: dict[str, Any]) -> list[str]:
    """Rename old training arguments in a raw config, in place, and return the problems."""
    problems = []
    for section, key in (("base_training", "args"), ("training", "args_override")):
        args = raw[section].get(key) if isinstance(raw.get(section), dict) else None
        if isinstance(args, dict):
            raw[section][key], found = rename_old(args, f"{section}.{key}")
            problems += found
    return problems
