"""Check the arguments meant for TrainingArguments or SFTConfig, without importing either."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from fish_tuning.experiments.config.sections import FieldProblems

logger = logging.getLogger(__name__)

DEFAULT_ARGS: dict[str, Any] = {
    "learning_rate": 5e-5,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "num_train_epochs": 3.0,
    "weight_decay": 0.01,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "report_to": "none",
}
"""Training arguments that neither base_config.yaml nor the experiment sets."""

_OLD_NAMES = {
    "evaluation_strategy": "eval_strategy",
    "overwrite_output_dir": None,
    "warmup_ratio": "warmup_steps",
}
"""Names of older transformers that the original work's files use, and today's; None: gone."""

_SET_ELSEWHERE = {
    "output_dir": "training.output_dir",
    "seed": "seeds",
    "data_seed": "seeds",
    "label_names": "dataset.label_names",
    "resume_from_checkpoint": "nothing: a rerun of the command resumes by itself",
    "dataset_text_field": "dataset.text_column",
    "dataset_kwargs": "the keys of dataset",
    "dataset_num_proc": "nothing: examples are prepared once, in batches",
    "eval_packing": "nothing: rows are evaluated one by one",
    "shuffle_dataset": "nothing: training data is shuffled in any case",
    "truncation_mode": "nothing: the start is kept",
    "chat_template_path": "a model with a chat template",
    "eos_token": "model.config_overrides.eos_token_id",
    "pad_token": "model.config_overrides.pad_token_id",
    "model_init_kwargs": "the keys of model",
    "trust_remote_code": "model.trust_remote_code",
}

_AT_LEAST_ONE = {
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "max_length",
}

_SIMPLE_TYPES: dict[str, Any] = {kind.__name__: kind for kind in (int, float, bool, str)}
_SIMPLE_TYPES |= {f"{name} | None": kind | None for name, kind in _SIMPLE_TYPES.items()}


@functools.cache
def argument_types() -> dict[str, str]:
    """Return the fields of the installed transformers.TrainingArguments and their annotations.

    They are parsed from its source, because importing it takes seconds and a wrong config should
    be refused at once.
    """
    return _arguments("transformers", "training_args.py", "TrainingArguments")


@functools.cache
def sft_arguments() -> dict[str, str]:
    """Return the fields that the installed trl.SFTConfig adds; none if TRL is not installed."""
    try:
        own = _arguments("trl", "trainer/sft_config.py", "SFTConfig")
    except ModuleNotFoundError:
        return {}
    return {name: kind for name, kind in own.items() if name not in argument_types()}


def _arguments(package: str, file: str, name: str) -> dict[str, str]:
    fields = _class_fields(package, file, name)
    # Dataclass fields are annotated; other assignments are constants of the class.
    return {name: annotation for name, annotation in fields.items() if annotation}


@functools.cache
def peft_methods() -> tuple[str, ...]:
    """Return the names of the installed PEFT's methods, parsed from its source."""
    return tuple(_class_fields("peft", "utils/peft_types.py", "PeftType"))


def rename_old(args: Mapping[Any, Any], path: str) -> tuple[dict[Any, Any], list[str]]:
    """Replace argument names of older transformers, and log a warning for each.

    Args:
        args: The arguments as given.
        path: Where they stand in the config, for messages.

    Returns:
        The arguments under today's names, and a problem for each that is also given under its
        new name.
    """
    renamed: dict[Any, Any] = {}
    problems = []
    for name, value in args.items():
        if name not in _OLD_NAMES or name in argument_types():
            renamed[name] = value
        elif (new := _OLD_NAMES[name]) is None:
            logger.warning("%s.%s: transformers no longer has it; left out", path, name)
        elif new in args:
            problems.append(f"{path}.{name}: is the old name of {new}, given too; remove one")
        else:
            logger.warning("%s.%s: is called %s now; taken as that", path, name, new)
            renamed[new] = value
    return renamed, problems


def check_args(args: dict[str, Any]) -> dict[str, Any]:
    """Check the names and simple types of training arguments; convert numbers written as text.

    Raises:
        FieldProblems: Arguments are unknown, of the wrong type or set elsewhere in the config.
    """
    types = argument_types() | sft_arguments()
    checked, problems = {}, {}
    for name, value in args.items():
        if name in _SET_ELSEWHERE:
            problems[name] = f"is set for each run; use {_SET_ELSEWHERE[name]} instead"
        elif name not in types:
            near = difflib.get_close_matches(name, types, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            problems[name] = f"is not an argument of transformers.TrainingArguments{hint}"
        elif types[name] in _SIMPLE_TYPES:
            try:
                if isinstance(value, bool) and "bool" not in types[name]:
                    raise ValueError
                checked[name] = TypeAdapter(_SIMPLE_TYPES[types[name]]).validate_python(value)
            except ValueError:
                problems[name] = f"{value!r} should be of type {types[name]}"
            else:
                if name in _AT_LEAST_ONE and checked[name] is not None and checked[name] < 1:
                    problems[name] = f"{value!r} must be at least 1"
        else:
            checked[name] = value
    if problems:
        raise FieldProblems(problems)
    return checked


def _class_fields(package: str, file: str, name: str) -> dict[str, str]:
    """Return the public names assigned in a class body of an installed package: annotations."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed", name=package)
    tree = ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name)
    fields = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            fields[node.target.id] = ast.unparse(node.annotation)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            fields[node.targets[0].id] = ""
    return {name: kind for name, kind in fields.items() if not name.startswith("_")}
