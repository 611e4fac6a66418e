"""Settings of the original work's base config."""

import logging

import pytest

from fish_tuning.experiments.config.load import load_config
from fish_tuning.experiments.errors import ConfigError
from tests.experiments.config.config_files import written

BASE = "fish_tuning:\n  fish_tuning:\n  report_to: wandb\n"


def test_taken_with_a_notice(tmp_path, caplog):
    """Guards the original work's own file against being refused."""
    path = written(tmp_path, "model: {name: x}\ndataset: {load_args: [imdb]}")
    (tmp_path / "base_config.yaml").write_text(BASE, encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="fish_tuning"):
        assert load_config(path).training_args["report_to"] == "wandb"
    assert [record.getMessage() for record in caplog.records] == [
        "fish_tuning.fish_tuning: is empty; left out",
        "fish_tuning.report_to: is an argument of the Trainer; taken as "
        "base_training.args.report_to",
    ]


@pytest.mark.parametrize("args", ["{report_to: none}", "{learning_rate: 1.0e-3, report_to: none}"])
def test_the_argument_takes_precedence(tmp_path, caplog, args):
    """Guards the Trainer's arguments against the setting beside them."""
    data = "model: {name: x}\ndataset: {load_args: [imdb]}"
    text = f"{BASE}base_training: {{args: {args}}}\n{data}"
    with caplog.at_level(logging.WARNING, logger="fish_tuning"):
        assert load_config(written(tmp_path, text)).training_args["report_to"] == "none"
    assert "which is given too and takes precedence" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fish_tuning: {fish_tuning: {seed: 1}}", r"fish_tuning\.fish_tuning: unknown key"),
        (BASE + "base_training: 3", "base_training: 3 should be a valid dictionary"),
        (BASE + "base_training: {args: [1]}", r"fish_tuning\.report_to: unknown key"),
    ],
)
def test_anything_else_is_refused(tmp_path, text, message):
    """Guards settings that would be lost without a word."""
    with pytest.raises(ConfigError, match=message):
        load_config(written(tmp_path, text + "\nmodel: {name: x}\ndataset: {load_args: [imdb]}"))
