"""Runs in the form of the files in PEFT's `method_comparison/MetaMathQA/results`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fish_tuning.atomic import write_atomically
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.results import Results, Run

_PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")


def write_method_comparison(sweep: Results, home: Path, folder: Path) -> list[Path]:
    """Write one file per finished run of a language model.

    Reserved memory over time is not recorded; its average and 99th percentile are null. Memory is
    the peak of what was allocated. Forgetting is, as there, the increase of the loss on text
    unrelated to the task: on the first of `evaluation_sets`.

    Args:
        sweep: The runs.
        home: The folder of their results.json, where the adapters are.
        folder: Where the files go.

    Returns:
        The files.

    Raises:
        ConfigError: No run of a language model is finished.
    """
    runs = [run for run in sweep.runs if run.status == "finished" and run.metrics_before]
    if not runs:
        raise ConfigError(
            f"{home}: holds no finished run of a language model, which alone can be laid beside "
            "PEFT's results; run an experiment with dataset.task: causal_lm"
        )
    paths = []
    for run in runs:
        path = folder / f"{run.run_id}.json"
        text = json.dumps(_entry(sweep, run, home), indent=2, ensure_ascii=False)
        write_atomically(path, text.encode("utf-8", errors="replace"))
        paths.append(path)
    return paths


def _entry(sweep: Results, run: Run, home: Path) -> dict[str, Any]:
    began, ended = map(datetime.fromisoformat, (run.started_at, run.finished_at))
    return {
        "run_info": {
            "created_at": run.started_at,
            "total_time": (ended - began).total_seconds(),
            "experiment_name": f"{re.sub(r'[^a-z0-9]+', '-', run.arm.lower())}/{run.run_id}",
            "peft_branch": "main",
            "train_config": _train_config(run),
            "peft_config": _peft_config(run, home),
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": None,
            "accelerator_memory_max": run.peak_memory_bytes,
            "accelerator_memory_reserved_99th": None,
            "train_time": run.train_seconds,
            "file_size": run.adapter_bytes,
            "num_trainable_params": run.trainable_params,
            "num_total_params": run.total_params,
            "status": "success",
            "metrics": _metrics(run),
        },
        "meta_info": {
            "model_info": None,
            "dataset_info": {sweep.name: run.config.get("dataset")},
            "package_info": {f"{name}-version": run.versions.get(name) for name in _PACKAGES},
            "system_info": run.hardware,
        },
    }


def _train_config(run: Run) -> dict[str, Any]:
    args = {**run.config["base_training"]["args"], **run.config["training"]["args_override"]}
    rate = run.learning_rate if run.learning_rate is not None else args.get("learning_rate")
    return {
        "model_id": run.config["model"]["name"],
        "dtype": run.config["model"]["precision"],
        "max_seq_length": args.get("max_length") or run.config["training"]["max_seq_length"],
        "batch_size": args.get("per_device_train_batch_size"),
        "batch_size_eval": args.get("per_device_eval_batch_size"),
        "max_steps": args.get("max_steps", -1),
        "seed": run.seed,
        "optimizer_type": args.get("optim", "adamw_torch"),
        "optimizer_kwargs": {"lr": rate, "weight_decay": args.get("weight_decay", 0.0)},
        "lr_scheduler": args.get("lr_scheduler_type", "linear"),
        "query_template": run.config["dataset"].get("prompt_template"),
        "fish_tuning": {"arm": run.arm, "ratio": run.ratio},
    }


def _peft_config(run: Run, home: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(
            # Changes of a model's own weights may be several adapters with the same settings.
            min((home / str(run.adapter)).rglob("adapter_config.json")).read_text(encoding="utf-8")
        )
    except (OSError, ValueError):
        return None
    return content


def _metrics(run: Run) -> list[dict[str, Any]]:
    """One entry per evaluation, and a last one as PEFT's tests of the final model write it."""
    losses = run.train_curve
    last = run.curve[-1]["step"] if run.curve else (losses[-1]["step"] if losses else 0)
    args = {**run.config["base_training"]["args"], **run.config["training"]["args_override"]}
    batch = args.get("per_device_train_batch_size", 8) * args.get("gradient_accumulation_steps", 1)
    final: dict[str, Any] = {
        "step": last,
        "test accuracy": run.metrics.get("exact_match"),
        "train loss": losses[-1]["loss"] if losses else None,
        "train samples": int(last * batch * run.hardware.get("processes", 1)),
        "train total tokens": None,
        **_forgetting(run, list(run.config.get("evaluation_sets") or {})),
        **{name: value for name, value in run.metrics.items() if name != "exact_match"},
    }
    return [*({**entry} for entry in run.curve), final]


def _forgetting(run: Run, sets: Sequence[str]) -> dict[str, float]:
    key = f"{sets[0]}_loss" if sets else ""
    if key not in run.metrics or key not in run.metrics_before:
        return {}
    return {"forgetting": run.metrics[key] - run.metrics_before[key]}
