"""Which checkpoint an interrupted run can go on from."""

from __future__ import annotations

import json
import logging
import re
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fish_tuning.mask import FishMask

logger = logging.getLogger(__name__)

_ADAPTER = "adapter_model.safetensors"


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
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, SafetensorError) as error:
        return str(error)
    return None


def _open_adapter(path: Path) -> None:
    with safe_open(path / _ADAPTER, framework="pt") as file:
        if not file.keys():
            raise ValueError(f"{path / _ADAPTER} is empty")
