"""Checkpoints: which one an interrupted run can resume from."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import TrainerCallback

from fish_tuning.mask.mask import FishMask

logger = logging.getLogger(__name__)


class DatedByStep(TrainerCallback):
    """Sets the date of each checkpoint to its step.

    Trainer deletes the checkpoints with the earliest dates, which would be the newest ones if the
    clock had been set back.
    """

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the date of the checkpoint that has just been written."""
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if path.is_dir():
            os.utime(path, (state.global_step, state.global_step))


def newest_complete(folder: Path, *, masked: bool, processes: int = 1) -> Path | None:
    """Find the newest checkpoint that training can resume from, and delete damaged ones.

    A process may be killed at any moment, even while it writes or deletes a checkpoint.

    Args:
        folder: The output folder of a transformers Trainer.
        masked: Whether each checkpoint must hold a mask.
        processes: The number of processes that will resume. Each of them must have left its random
            state.

    Returns:
        The checkpoint's folder, or None.
    """
    found = [
        (int(match[1]), path)
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    for _, path in sorted(found, reverse=True):
        problem = _problem(path, masked, processes)
        if problem is None:
            return path
        logger.info("%s is deleted: %s", path, problem)
        shutil.rmtree(path, ignore_errors=True)
    return None


def _problem(path: Path, masked: bool, processes: int) -> str | None:
    try:
        state = json.loads((path / "trainer_state.json").read_bytes())
        if state["global_step"] >= state["max_steps"]:
            # Resumed from there, Trainer would take another step if it is not the end of an epoch.
            return "it is the end of training"
        states = [f"rng_state_{rank}.pth" for rank in range(processes)]
        if processes == 1:
            states = ["rng_state.pth"]
        for name in ("optimizer.pt", "scheduler.pt", *states):
            with zipfile.ZipFile(path / name) as file:
                if (damaged := file.testzip()) is not None:
                    return f"{name}: {damaged} is damaged"
        _open_weights(path)
        if masked:
            FishMask.from_pretrained(path)
        if state["best_model_checkpoint"] is not None:
            _open_weights(Path(state["best_model_checkpoint"]))
    # The readers of JSON and archives raise many kinds of errors for damaged files.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _open_weights(path: Path) -> None:
    """Open the weights of an adapter or, if the model's own weights are trained, of the model."""
    weights = list(path.glob("*model*.safetensors"))
    if not weights:
        raise ValueError(f"{path} holds no weights")
    for part in weights:
        with safe_open(part, framework="pt") as file:
            if not file.keys():
                raise ValueError(f"{part} is empty")
