"""GGUF files as ordinary model folders: quantized weights become float32, once per file."""

from __future__ import annotations

import logging
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fish_tuning.experiments.models.packaged import file_sha256

logger = logging.getLogger(__name__)


def converted_gguf(file: Path) -> Path:
    """Return a folder that holds a GGUF file's model as `save_pretrained` writes it.

    transformers takes a minute to read such a file, and marks the model as quantized, so that it
    cannot be saved. The converted model is therefore kept in the cache of the hub's client, under
    the file's hash and the version of transformers.

    Args:
        file: The GGUF file.

    Raises:
        ImportError: The package gguf is not installed.
        OSError: The file cannot be read.
        ValueError: transformers does not know the file's architecture.
    """
    from huggingface_hub.constants import HF_HOME

    name = f"{file_sha256(file)[:16]}-transformers-{version('transformers')}"
    folder = Path(HF_HOME) / "fish_tuning" / name
    if not folder.is_dir():
        logger.info("%s is converted to %s", file, folder)
        temporary = folder.with_name(f".{name}.{os.getpid()}.tmp")
        try:
            _convert(file, temporary)
            # Another process may have been faster; its folder has the same content.
            if not folder.is_dir():
                os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": file.name}
    quantized = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **source)
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # transformers refuses to save a model that it loaded as quantized, whatever its config says.
    family: Any = AutoModelForCausalLM
    model = family.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, **source).save_pretrained(folder)
