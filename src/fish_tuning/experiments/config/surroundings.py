"""What a sweep needs around it: trackers, and the data set on the hub. No slow imports."""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
from pathlib import Path

from fish_tuning.experiments.config.dataset import DatasetConfig
from fish_tuning.experiments.config.schema import ExperimentConfig
from fish_tuning.experiments.errors import ConfigError, first_line
from fish_tuning.hub import ask_hub

_PACKAGES = {"azure_ml": "azureml", "flyte": "flytekit"}
"""The modules of trackers that are not called like their module."""

_LOADERS = {
    *("arrow", "audiofolder", "csv", "hdf5", "imagefolder", "json", "pandas", "parquet"),
    *("pdffolder", "sql", "text", "videofolder", "webdataset", "xml"),
}
"""Names that `datasets.load_dataset` takes for formats of local files, not for repositories."""


def check_trackers(config: ExperimentConfig, *, installed: bool) -> None:
    """Check `report_to`, which transformers itself looks at only when a run begins.

    Args:
        config: The experiment.
        installed: Whether the trackers have to be installed too.

    Raises:
        ConfigError: A tracker is unknown or not installed.
    """
    problems = []
    for name in trackers_of(config):
        if name not in known_trackers():
            problems.append(f"{name!r} is unknown; use none, all or {', '.join(known_trackers())}")
        elif installed and not _is_installed(name):
            problems.append(
                f"{name} is not installed; run: pip install {_PACKAGES.get(name, name)}, or set "
                "report_to: none"
            )
    if problems:
        where = config.argument_path("report_to")
        raise ConfigError([f"{where}: {problem}" for problem in problems])


def trackers_of(config: ExperimentConfig) -> list[str]:
    """Return the trackers that `report_to` asks for; for "all", those that are installed."""
    wanted = config.training_args.get("report_to") or []
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    if "all" in names:
        return [name for name in known_trackers() if _is_installed(name)]
    return [name for name in names if name != "none"]


@functools.cache
def known_trackers() -> tuple[str, ...]:
    """Return the trackers of the installed transformers, parsed from its source."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("transformers is not installed", name="transformers")
    file = Path(spec.origin).parent / "integrations" / "integration_utils.py"
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id == "INTEGRATION_TO_CALLBACK"
        ):
            assert isinstance(node.value, ast.Dict)
            return tuple(str(ast.literal_eval(key)) for key in node.value.keys if key)
    raise AssertionError(f"{file} has no INTEGRATION_TO_CALLBACK")


def _is_installed(tracker: str) -> bool:
    modules = [_PACKAGES.get(tracker, tracker)] + ["tensorboardX"] * (tracker == "tensorboard")
    return any(importlib.util.find_spec(module) is not None for module in modules)


def check_hub_dataset(config: DatasetConfig) -> None:
    """Check that a data set is on the hub, or that an earlier download is in the cache.

    Without a network, `datasets` itself would try again for half a minute.

    Raises:
        ConfigError: It is in neither place.
    """
    if not config.load_args:
        return
    name = str(config.load_args[0])
    if name in _LOADERS or Path(name).exists() or _is_cached(name):
        return
    try:
        ask_hub(name, repo_type="dataset")
    # The hub's HTTP clients have no common base class for network errors.
    except Exception as error:
        raise ConfigError(
            f"dataset.load_args: there is no folder {name!r}, no earlier download of it, and the "
            f"hub does not give it ({first_line(error)}); check the name and the network, or use "
            "dataset.path for local data"
        ) from None


def _is_cached(name: str) -> bool:
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets")
    # A data set of an organization may be called by its own name alone: "glue" is "nyu-mll/glue".
    return any(cache.glob(f"*{name.replace('/', '___')}"))
