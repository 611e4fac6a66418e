"""Trackers and data sets of the hub are checked before anything slow is imported."""

import subprocess
import sys

import pytest
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from fish_tuning.experiments.config import surroundings
from fish_tuning.experiments.config.load import load_config
from fish_tuning.experiments.config.surroundings import (
    check_hub_dataset,
    check_trackers,
    known_trackers,
)
from fish_tuning.experiments.errors import ConfigError
from tests.experiments.config.config_files import written


def config_with(tmp_path, text):
    return load_config(
        written(tmp_path, f"model: {{name: x}}\ndataset: {{load_args: [imdb]}}\n{text}")
    )


def test_trackers_of_the_installed_transformers():
    """Guards the names that are parsed from its source."""
    assert set(known_trackers()) == set(INTEGRATION_TO_CALLBACK)


@pytest.mark.parametrize("value", ["none", "all", "[none]", "[]"])
def test_nothing_to_check(tmp_path, value):
    """Guards values that name no tracker."""
    text = f"training: {{args_override: {{report_to: {value}}}}}"
    check_trackers(config_with(tmp_path, text), installed=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "training: {args_override: {report_to: trackr}}",
            r"training\.args_override\.report_to: 'trackr' is unknown; use none, all or .*wandb",
        ),
        (
            "base_training: {args: {report_to: [tensorboard, wandb]}}",
            r"base_training\.args\.report_to: tensorboard is not installed; run: pip install tens",
        ),
    ],
)
def test_trackers(tmp_path, monkeypatch, text, message):
    """Guards against a sweep whose every run fails for want of a tracker."""
    config = config_with(tmp_path, text)
    monkeypatch.setattr(surroundings, "_is_installed", lambda tracker: False)
    with pytest.raises(ConfigError, match=message):
        check_trackers(config, installed=True)
    if "unknown" not in message:
        check_trackers(config, installed=False)


def test_a_tracker_that_is_overridden(tmp_path, monkeypatch):
    """Guards a shared base config whose tracker an experiment turns off."""
    text = "base_training: {args: {report_to: wandb}}\ntraining: {args_override: {report_to: none}}"
    monkeypatch.setattr(surroundings, "_is_installed", lambda tracker: False)
    check_trackers(config_with(tmp_path, text), installed=True)


def test_hub_data_set(tmp_path, monkeypatch):
    """Guards a data set that cannot be reached, and those that need not be."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    asked = []

    def ask(name, *, repo_type):
        asked.append((name, repo_type))
        raise ConnectionError("no route\nat all")

    monkeypatch.setattr(surroundings, "ask_hub", ask)
    dataset = config_with(tmp_path, "").dataset
    with pytest.raises(ConfigError, match=r"dataset\.load_args: there is no folder 'imdb'.*\(no r"):
        check_hub_dataset(dataset)
    assert asked == [("imdb", "dataset")]
    for name in ("csv", str(tmp_path)):
        check_hub_dataset(dataset.model_copy(update={"load_args": [name]}))
    (tmp_path / "stanfordnlp___imdb").mkdir()
    check_hub_dataset(dataset)
    assert len(asked) == 1


def test_no_slow_imports():
    """Guards the second in which a mistake is told."""
    program = """
import sys
import fish_tuning.experiments.config.surroundings, fish_tuning.experiments.config.lock
sys.exit(bool({"torch", "transformers", "datasets"} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
