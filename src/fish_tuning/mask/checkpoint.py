"""The mask in a checkpoint, which has a folder for each adapter that is not called "default"."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fish_tuning.mask.files import JSON_FILE
from fish_tuning.mask.mask import FishMask


def mask_of_checkpoint(model: nn.Module, checkpoint: str) -> FishMask:
    """The mask that a checkpoint of a model was trained with, of all its adapters together.

    Raises:
        FileNotFoundError: It has no mask.
    """
    tensors: dict[str, Any] = {}
    provenance: dict[str, Any] = {}
    for folder in mask_folders(model, checkpoint):
        mask = FishMask.from_pretrained(str(folder))
        tensors |= mask
        provenance |= mask.provenance
    return FishMask(tensors, provenance=provenance)


def mask_folders(model: nn.Module, checkpoint: str) -> list[Path]:
    """The folders of a checkpoint with a mask; the checkpoint itself if there is none."""
    adapters: Mapping[str, Any] = getattr(model, "peft_config", None) or {}
    folders = [Path(checkpoint), *(Path(checkpoint, adapter) for adapter in adapters)]
    return [folder for folder in folders if (folder / JSON_FILE).is_file()] or folders[:1]
