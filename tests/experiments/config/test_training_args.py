"""The arguments of transformers.TrainingArguments in a config."""

import dataclasses
import logging
import textwrap

from fish_tuning.experiments.config.load import (
    load_config,
)
from fish_tuning.experiments.config.training_args import DEFAULT_ARGS, argument_types, peft_methods
from tests.experiments.config.config_files import MINIMAL, written


def test_old_argument_names_are_mapped_before_layers_merge(tmp_path, caplog):
    """Guards old names over a base that uses the new ones, and that the notice is given."""
    written(tmp_path, "base_training: {args: {eval_strategy: epoch}}", "base_config.yaml")
    text = MINIMAL + textwrap.dedent(
        """
        base_training:
          args:
            evaluation_strategy: no
            warmup_ratio: 0.1
            overwrite_output_dir: true
        """
    )
    with caplog.at_level(logging.WARNING):
        args = load_config(written(tmp_path, text)).training_args
    assert args["eval_strategy"] == "no"
    assert args["warmup_steps"] == 0.1
    assert set(args) == {*DEFAULT_ARGS, "warmup_steps"}
    assert "base_training.args.evaluation_strategy: is called eval_strategy now" in caplog.text
    assert "base_training.args.overwrite_output_dir" in caplog.text


def test_argument_names_are_those_of_transformers():
    """Guards the reading of argument names from source against the real dataclass."""
    from transformers import TrainingArguments

    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert set(argument_types()) == fields
    assert set(DEFAULT_ARGS) <= fields


def test_default_arguments_build_training_arguments(tmp_path):
    """Guards against defaults that transformers refuses together."""
    from transformers import TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), **DEFAULT_ARGS)
    assert args.learning_rate == 5e-5


def test_peer_names_are_those_of_peft():
    """Guards the reading of method names from source against the real enum."""
    from peft import PeftType

    assert set(peft_methods()) == {member.name for member in PeftType}
