"""What can be told to be wrong before the slow imports and before anything is written."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

from fish_tuning.experiments.config.load import check_output_dir
from fish_tuning.experiments.config.schema import AFTER_WARMUP, MINILM, ExperimentConfig
from fish_tuning.experiments.errors import ConfigError

ADAM = ("adamw_torch", "adamw_torch_fused")
"""The optimizers whose moments the criteria of `AFTER_WARMUP` look at."""
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")
_HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
_HUB_SECONDS = 3.0


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
        ConfigError: If the best model cannot be kept because saving and evaluation differ, or a
            criterion looks at an optimizer that is not used.
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
    optimizer = args.get("optim", ADAM[0])
    problems += [
        f"fish_tuning.variants: {variant.name}: {variant.criterion} looks at AdamW's moments, "
        f"which {_path(config, 'optim')}: {optimizer!r} does not keep; use one of {', '.join(ADAM)}"
        for variant in config.fish_tuning.variants
        if variant.criterion in AFTER_WARMUP and optimizer not in ADAM
    ]
    if problems:
        raise ConfigError(problems)


def _path(config: ExperimentConfig, name: str) -> str:
    section = (
        "training.args_override" if name in config.training.args_override else "base_training.args"
    )
    return f"{section}.{name}"


def check_model(name: str, *, weights: bool = False) -> None:
    """Check that there is a model of that name, without loading it.

    Args:
        name: As in `model.name`.
        weights: Whether a local folder has to hold weights beside its config.json.

    Raises:
        ConfigError: If there is none, or if that cannot be found out.
    """
    if name == MINILM:
        return
    folder = Path(name)
    if folder.is_dir():
        _check_folder(folder, weights)
    elif folder.exists():
        raise ConfigError(f"model.name: {name!r} is a file; name the folder that holds it")
    elif not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise ConfigError(
            f"model.name: there is no folder {name!r}, and it is no hub id (owner/name) either; "
            f"correct it, or use {MINILM}"
        )
    else:
        _check_hub(name)


def _check_folder(folder: Path, weights: bool) -> None:
    file = folder / "config.json"
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ConfigError(
            f"model.name: {str(folder)!r} holds no config.json; name a folder that "
            "save_pretrained wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.name: {str(file)!r} cannot be read: {error}; restore it"
        ) from None
    if not isinstance(content, dict) or "model_type" not in content:
        raise ConfigError(
            f"model.name: {str(file)!r} has no model_type; name the folder of a transformers model"
        )
    if weights and not any(path for pattern in _WEIGHTS for path in folder.glob(pattern)):
        raise ConfigError(
            f"model.name: {str(folder)!r} holds no weights ({', '.join(_WEIGHTS)}); with its "
            "config.json alone, only `fish-tuning plan` works"
        )


def _check_hub(name: str) -> None:
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    remedy = f"correct it, name a local folder, or use {MINILM}"
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        # One attempt: downloads retry for half a minute where there is no network.
        HfApi().model_info(name, timeout=_HUB_SECONDS)
    except HFValidationError:
        raise ConfigError(f"model.name: {name!r} is no folder and no hub id; {remedy}") from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"model.name: there is no folder and no hub model {name!r} that you may read; {remedy}"
        ) from None
    # Its HTTP clients share no base class for what they raise without a network.
    except Exception as error:
        if "Timeout" in type(error).__name__:
            return  # A slow hub is no fault of the config; the download has more patience.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"model.name: there is no folder {name!r}, and the hub cannot be asked for it "
            f"({reason}); {remedy}"
        ) from None
