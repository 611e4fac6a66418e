"""Which checkpoint an interrupted run can go on from."""

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

_ADAPTER = "adapter_model.safetensors"


class DatedByStep(TrainerCallback):
    """Dates each checkpoint by its step: Trainer deletes those of the earliest date.

    A clock that was put back would else have it delete the newest one.
    """

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Dates the checkpoint that has just been written."""
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if path.is_dir():
            os.utime(path, (state.global_step, state.global_step))


def newest_complete(folder: Path, *, masked: bool, processes: int = 1) -> Path | None:
    """Find the newest checkpoint that training can go on from; remove those that it cannot.

    A process may be killed at any moment, also while it writes a checkpoint or deletes one.

    Args:
        folder: The output folder of a transformers Trainer.
        masked: Whether a mask belongs to each checkpoint.
        processes: How many processes are to go on: as many have to have left their random states.

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
        logger.info("%s is left out: %s", path, problem)
        shutil.rmtree(path, ignore_errors=True)
    return None


def _problem(path: Path, masked: bool, processes: int) -> str | None:
    try:
        state = json.loads((path / "trainer_state.json").read_bytes())
        if state["global_step"] >= state["max_steps"]:
            # Resumed at the end of training, in the middle of an epoch, Trainer takes a step more.
            return "it is the end of training"
        states = [f"rng_state_{rank}.pth" for rank in range(processes)]
        if processes == 1:
            states = ["rng_state.pth"]
        for name in ("optimizer.pt", "scheduler.pt", *states):
            with zipfile.ZipFile(path / name) as file:
                if (damaged := file.testzip()) is not None:
                    return f"{name}: {damaged} is damaged"
        _open_adapter(path)
        if masked:
            FishMask.from_pretrained(path)
        if state["best_model_checkpoint"] is not None:
            _open_adapter(Path(state["best_model_checkpoint"]))
    # What the readers of JSON and of archives raise over damage is a long list.
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _open_adapter(path: Path) -> None:
    with safe_open(path / _ADAPTER, framework="pt") as file:
        if not file.keys():
            raise ValueError(f"{path / _ADAPTER} is empty")
