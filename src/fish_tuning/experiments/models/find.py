"""Find out whether a model can be loaded, without importing torch."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

from fish_tuning.experiments.config.model import MINILM, SMOLLM2, ModelConfig
from fish_tuning.experiments.errors import ConfigError, first_line
from fish_tuning.experiments.models.minilm import minilm_path
from fish_tuning.experiments.models.smollm2 import smollm2_file
from fish_tuning.hub import ask_hub

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin*")
_HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")


PACKAGED: dict[str, Callable[[], Path]] = {MINILM: minilm_path, SMOLLM2: smollm2_file}
"""Models that are installed as packages: name to folder or GGUF file."""


def check_model(config: ModelConfig, *, weights: bool = False) -> None:
    """Check that a model exists, without loading it.

    Args:
        config: The model.
        weights: Whether a local folder must hold weights beside its config.json.

    Raises:
        ConfigError: The model does not exist, or the hub cannot be asked for it.
    """
    name = config.name
    if config.gguf_file is not None or name == SMOLLM2:
        _check_gguf(config)
    if name in PACKAGED:
        packaged_path(name)
        return
    folder = Path(name)
    if folder.is_dir():
        if config.gguf_file is None:
            _check_folder(folder, weights)
    elif folder.exists():
        raise ConfigError(f"model.name: {name!r} is a file; name the folder that holds it")
    elif not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise ConfigError(
            f"model.name: there is no folder {name!r}, nor is it a hub id (owner/name); "
            f"correct it, or use {' or '.join(PACKAGED)}"
        )
    else:
        _check_hub(name, config.gguf_file or "config.json")


def packaged_path(name: str) -> Path:
    """Return the folder or GGUF file of a packaged model.

    Raises:
        ConfigError: Its package is not installed, or its weights are not the published ones.
    """
    try:
        return PACKAGED[name]()
    except (ModuleNotFoundError, ValueError) as error:
        raise ConfigError(f"model.name: {error}") from None


def _check_gguf(config: ModelConfig) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            f"model: {config.gguf_file or config.name!r} is a GGUF file, which needs the package "
            "gguf; run: pip install 'fish-tuning[llm]'"
        )
    if config.gguf_file is None:
        return
    folder = Path(config.name)
    if config.name in PACKAGED:
        raise ConfigError(f"model.gguf_file: {config.name} has its own weights; remove it")
    if folder.is_dir() and not (folder / config.gguf_file).is_file():
        found = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))) or "none"
        raise ConfigError(
            f"model.gguf_file: {config.name!r} holds no file {config.gguf_file!r}; its GGUF "
            f"files: {found}"
        )


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


def _check_hub(name: str, file: str) -> None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    remedy = f"correct it, name a local folder, or use {' or '.join(PACKAGED)}"
    try:
        if isinstance(try_to_load_from_cache(name, file), str):
            return
        ask_hub(name)
    except HFValidationError:
        raise ConfigError(
            f"model.name: {name!r} is neither a folder nor a hub id; {remedy}"
        ) from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"model.name: there is no folder and no hub model {name!r} that you may read; {remedy}"
        ) from None
    # The hub's HTTP clients have no common base class for network errors.
    except Exception as error:
        raise ConfigError(
            f"model.name: there is no folder {name!r}, and the hub cannot be asked for it "
            f"({first_line(error)}); {remedy}"
        ) from None


def check_quantization(config: ModelConfig) -> None:
    """Check that the package that quantizes weights is installed, if the config asks for it.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if config.quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.quantization: {config.quantization!r} needs bitsandbytes, which is not "
            "installed; run: pip install 'fish-tuning[quantization]', or set it to null"
        )
