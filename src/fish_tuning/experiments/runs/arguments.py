"""The transformers.TrainingArguments of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from fish_tuning.experiments.config.schema import ExperimentConfig
from fish_tuning.experiments.errors import ConfigError, first_line
from fish_tuning.experiments.metrics.names import TEXT_METRICS, greater_is_better

PROJECT = "fish-tuning"
"""What trackers call the project, unless the config does."""


def training_arguments(
    config: ExperimentConfig,
    folder: Path,
    seed: int,
    metrics: Sequence[str] = ("loss",),
    **changes: Any,
) -> TrainingArguments:
    """Build the training arguments of a run.

    Args:
        config: The experiment.
        folder: Folder of the run's checkpoints.
        seed: The run's seed.
        metrics: Metrics computed at evaluations, the main metric first.
        **changes: Arguments that replace the experiment's.

    Raises:
        ConfigError: transformers refuses the arguments, or the best model is to be chosen by a
            metric that is not computed.
    """
    args = dict(config.training_args)
    if "logging_steps" not in args and (
        "eval_steps" in args or args.get("eval_strategy") != "steps"
    ):
        # Many fine-tunings are shorter than transformers' default of 500 steps. That number is
        # also the default of eval_steps, which must not change.
        args["logging_steps"] = 10
    if config.is_generative:
        args |= _sft_arguments(config)
    else:
        # Meant for losses averaged over the tokens of a batch. It would multiply the loss of a
        # classifier by the number of processes.
        args.setdefault("average_tokens_across_devices", False)
    args["metric_for_best_model"], args["greater_is_better"] = best_by(config, metrics)
    args.setdefault("report_to", "none")
    args.setdefault("project", PROJECT)
    args.setdefault("save_total_limit", 2)
    args.setdefault("log_level_replica", "error")
    args.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    # Otherwise transformers takes bf16 as a request for an accelerator.
    args.setdefault("use_cpu", not torch.accelerator.is_available())
    args |= {
        "output_dir": str(folder.absolute()),
        "seed": seed,
        "data_seed": seed,
        "label_names": ["labels"],
        "disable_tqdm": True,
        **changes,
    }
    try:
        if config.is_generative:
            from trl import SFTConfig

            return SFTConfig(**args)
        return TrainingArguments(**args)
    # Its checks raise many kinds of errors, some of them from torch and accelerate.
    except Exception as error:
        raise ConfigError(
            "base_training.args, training.args_override: transformers refuses them: "
            f"{first_line(error)}; correct the argument"
        ) from error


def _sft_arguments(config: ExperimentConfig) -> dict[str, Any]:
    """What SFTTrainer is told of examples that are tokenized, cut and labeled already."""
    given = config.training_args
    packing = bool(given.get("packing"))
    # SFTTrainer does not cut rows that it flattens, and asks to be told that they are short enough.
    uncut = bool(given.get("padding_free")) and not packing
    return {
        # Its own defaults are those of large models on recent accelerators.
        "bf16": given.get("bf16", False),
        "gradient_checkpointing": given.get("gradient_checkpointing", False),
        "max_length": None if uncut else config.max_length,
        "eval_packing": False,
        "completion_only_loss": None,
        "assistant_only_loss": False,
        "dataset_kwargs": {"skip_prepare_dataset": not packing},
    }


def best_by(config: ExperimentConfig, metrics: Sequence[str]) -> tuple[str, bool]:
    """How models are compared: by `metric_for_best_model`, and whether greater is better.

    Args:
        config: The experiment.
        metrics: Metrics computed at evaluations, the main metric first.

    Raises:
        ConfigError: That metric is not computed.
    """
    args = config.training_args
    # Texts are generated only once, after training.
    evaluated = [name for name in metrics if name not in TEXT_METRICS]
    chosen = args.get("metric_for_best_model", evaluated[0])
    name = str(chosen).removeprefix("eval_")
    if name not in (*evaluated, "loss"):
        raise ConfigError(
            f"base_training.args.metric_for_best_model: {chosen!r} is not computed; use one of "
            f"{', '.join(dict.fromkeys((*evaluated, 'loss')))}"
        )
    greater = args.get("greater_is_better")
    if greater is None:
        greater = name != "loss" and greater_is_better(name)
    return chosen, greater
