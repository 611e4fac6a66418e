"""FishConfig: what it accepts, and that files keep it."""

import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from fish_tuning import FishConfig


def test_json_round_trip():
    """Guards against settings that a file loses or changes; the mask's provenance is one."""
    config = FishConfig(
        num_trainable=900,
        scope="per_tensor",
        criterion="random",
        estimator="true",
        num_samples=None,
        seed=3,
        names_to_exclude=("modules_to_save", "lora_A"),
    )
    assert FishConfig.model_validate_json(config.model_dump_json()) == config
    assert FishConfig(**json.loads(config.model_dump_json())) == config


def test_every_setting_is_described():
    """Guards docs and help texts, which are made from the descriptions."""
    assert all(field.description for field in FishConfig.model_fields.values())


def test_no_torch():
    """Guards commands that check settings before the slow imports."""
    code = "import sys, fish_tuning.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"keep_ratio": 0.5, "keep_rato": 0.5},
            r"^keep_rato is not a setting: did you mean keep_ratio\?$",
        ),
        ({}, "^give exactly one of keep_ratio and num_trainable"),
        ({"keep_ratio": 0.5, "num_trainable": 5}, "exactly one of keep_ratio and num_trainable"),
        ({"keep_ratio": 0.0}, r"^keep_ratio=\S+ should be greater than 0"),
        ({"keep_ratio": 1.01}, r"^keep_ratio=\S+ should be less than or equal to 1"),
        ({"keep_ratio": float("nan")}, r"^keep_ratio=\S+ should be"),
        ({"num_trainable": 0}, r"^num_trainable=\S+ should be greater than or equal to 1"),
        ({"num_trainable": 2.5}, r"^num_trainable=\S+ should be a valid integer"),
        ({"keep_ratio": 0.5, "scope": "layer"}, r"^scope=\S+ should be 'global'"),
        ({"keep_ratio": 0.5, "criterion": "best"}, r"^criterion=\S+ should be 'fisher'"),
        ({"keep_ratio": 0.5, "estimator": "none"}, r"^estimator=\S+ should be 'empirical'"),
        ({"keep_ratio": 0.5, "num_samples": 0}, r"^num_samples=\S+ should be greater"),
        ({"keep_ratio": 0.5, "names_to_exclude": "head"}, r"^names_to_exclude=\S+ should be"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    """Guards against settings that are ignored or fail only after the scoring."""
    with pytest.raises(ValueError, match=message):
        FishConfig(**settings)
    with pytest.raises(ValidationError):
        FishConfig.model_validate(settings)


def test_several_wrong_settings():
    """Guards one sentence about all of them."""
    wanted = (
        r"^keep_ratio=2 should be less than or equal to 1; seed='a' should be a valid integer.*; "
        r"colour is not a setting: the settings are scope, .*names_to_exclude$"
    )
    settings = {"keep_ratio": 2, "seed": "a", "colour": "red"}
    with pytest.raises(ValueError, match=wanted):
        FishConfig(**settings)


def test_config_is_frozen():
    """Guards against a config that changes after the mask has recorded it."""
    config = FishConfig(keep_ratio=0.5)
    with pytest.raises(ValidationError, match="frozen"):
        config.keep_ratio = 0.1
