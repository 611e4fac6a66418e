"""What can be told to be wrong before the slow imports and before anything is written."""

from __future__ import annotations

import importlib.util

from fish_tuning.experiments.config.load import check_output_dir
from fish_tuning.experiments.config.schema import ExperimentConfig
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.models.find import check_model


def check_before_run(config: ExperimentConfig) -> None:
    """Check output folder, training arguments and model, as far as that takes no model.

    Raises:
        ConfigError: At the first thing that is missing or does not fit.
    """
    check_output_dir(config.training.output_dir)
    check_training_args(config)
    check_model(config.model.name, weights=True)
    if config.model.quantization and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.quantization: {config.model.quantization!r} needs bitsandbytes, which is not "
            "installed; run: pip install 'fish-tuning[quantization]', or set it to null"
        )


def check_local_data(config: ExperimentConfig) -> None:
    """Check local data by loading it: without torch, so that mistakes in it are told at once.

    Raises:
        ConfigError: As in `load_data`.
        ModuleNotFoundError: If the packages of the extra `experiments` are not installed.
    """
    from fish_tuning.experiments.data.load import load_data

    if config.dataset.path is not None:
        load_data(config.dataset)


def check_training_args(config: ExperimentConfig) -> None:
    """Check the conflicts among training arguments that transformers finds only when it builds.

    Raises:
        ConfigError: If the best model cannot be kept because saving and evaluation differ.
    """
    args = config.training_args
    strategies = {
        "eval_strategy": ("no", "steps", "epoch"),
        "save_strategy": ("no", "steps", "epoch", "best"),
        "logging_strategy": ("no", "steps", "epoch"),
    }
    problems = [
        f"{_path(config, name)}: {args[name]!r} is unknown; use one of {', '.join(allowed)}"
        for name, allowed in strategies.items()
        if args.get(name) is not None and args[name] not in allowed
    ]
    evaluation, saving = args.get("eval_strategy", "no"), args.get("save_strategy", "steps")
    if not problems and args.get("load_best_model_at_end") and saving != "best":
        interval = args.get("eval_steps") or args.get("logging_steps") or 500
        save_steps = args.get("save_steps", 500)
        remedy = "or set training.args_override.load_best_model_at_end: false"
        if evaluation != saving:
            problems.append(
                f"{_path(config, 'save_strategy')}: {saving!r} differs from eval_strategy "
                f"{evaluation!r} and load_best_model_at_end is true; set both alike, {remedy}"
            )
        elif saving == "steps" and min(interval, save_steps) >= 1 and save_steps % interval:
            problems.append(
                f"{_path(config, 'save_steps')}: {save_steps:g} is no multiple of eval_steps "
                f"({interval:g}) and load_best_model_at_end is true; make it one, {remedy}"
            )
    if problems:
        raise ConfigError(problems)


def _path(config: ExperimentConfig, name: str) -> str:
    section = (
        "training.args_override" if name in config.training.args_override else "base_training.args"
    )
    return f"{section}.{name}"
