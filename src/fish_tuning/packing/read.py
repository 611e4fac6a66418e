"""From a packed file back to its folder, or onto its model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from fish_tuning.atomic import write_new_folder_atomically
from fish_tuning.engines import check_model
from fish_tuning.mask.files import BITS_FILE
from fish_tuning.packing.packed_file import PackedFile, Source, unusable
from fish_tuning.packing.rebuild import rebuild
from fish_tuning.packing.safetensors_layout import join_safetensors
from fish_tuning.packing.start import ADAPTER_CONFIG, ModelOrName, Start, draw_start, read_start


def unpack(
    file: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    start: Start | None = None,
    base_model: ModelOrName | None = None,
) -> None:
    """Write the folder that was packed: exactly the same bytes, or nothing.

    Args:
        file: A file that `pack` wrote.
        folder: The folder to write. It must not exist, or be empty.
        start: The start that the file was packed with, if any; see `pack`.
        base_model: The base model of a file that was packed with a seed; see `pack`.

    Raises:
        FileNotFoundError: The file does not exist, or the start has no weights.
        FileExistsError: The folder is not empty.
        ValueError: The file is damaged, of another kind or of another version; the start is
            missing or is a different one; or the seed gives other numbers on this machine.
    """
    packed = _read(Path(file))
    write_new_folder_atomically(Path(folder), unpacked_files(packed, Path(file), start, base_model))


def load_packed(
    model: nn.Module,
    file: str | os.PathLike[str],
    *,
    start: Start | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Load a packed file onto its model.

    Args:
        model: For a packed adapter, its base model. For a model's own weights, the model before
            training, which is then also the start.
        file: A file that `pack` wrote.
        start: The start of an adapter that was packed with one; see `pack`.
        **kwargs: For an adapter, further arguments of `PeftModel.from_pretrained`.

    Returns:
        For an adapter, the `PeftModel` that `PeftModel.from_pretrained` returns for the unpacked
        folder. For a model's own weights, `model` itself.

    Raises:
        FileNotFoundError: The file does not exist, or the start has no weights.
        ValueError: For the reasons given in `unpack`, or the weights are another model's. The
            model is then unchanged.
    """
    check_model(model)
    path = Path(file)
    packed = _read(path)
    if packed.record.weights_name == "adapter_model.safetensors":
        from peft import PeftModel

        files = unpacked_files(packed, path, start, model)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "adapter"
            write_new_folder_atomically(folder, files)
            return PeftModel.from_pretrained(model, str(folder), **kwargs)
    if kwargs:
        raise TypeError(f"{', '.join(kwargs)}: only an adapter takes further arguments")
    own = model.state_dict()
    files = unpacked_files(packed, path, start if start is not None else own, None)
    tensors = safetensors.torch.load(files[packed.record.weights_name])
    # Files hold tied tensors under one of their names.
    held = {own[name].data_ptr() for name in tensors if name in own}
    differing = [name for name, tensor in own.items() if tensor.data_ptr() not in held]
    differing += [
        name
        for name, tensor in tensors.items()
        if name not in own or own[name].shape != tensor.shape
    ]
    if differing:
        raise ValueError(
            f"{path} holds the weights of another model: {len(differing)} tensors do not fit "
            f"({', '.join(differing[:3])}). Load it onto the model that was fine-tuned"
        )
    model.load_state_dict(tensors, strict=False)
    return model


def _read(path: Path) -> PackedFile:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name a file that fish-tuning pack wrote")
    return PackedFile.from_bytes(path.read_bytes(), path)


def unpacked_files(
    packed: PackedFile, path: Path, start: Start | None, base_model: ModelOrName | None
) -> dict[str, bytes]:
    """Return the contents of the files that were packed, by name."""

    def source(name: Source) -> Mapping[str, Tensor]:
        if name == "start":
            if start is None:
                raise ValueError(
                    f"{path} was packed with a start and cannot be unpacked without it: name the "
                    "adapter as it was before training, or the model that was fine-tuned (start=, "
                    "--start)"
                )
            return read_start(start)
        seed, config = packed.record.seed, packed.record.texts.get(ADAPTER_CONFIG)
        if seed is None or config is None:
            raise unusable(path, f"its record lacks a seed or {ADAPTER_CONFIG}")
        return draw_start(config, seed, base_model)

    record = packed.record
    return {
        record.weights_name: rebuild(packed, path, source),
        BITS_FILE: join_safetensors(record.mask_header.encode("latin-1"), packed.bits),
        **{name: text.encode("latin-1") for name, text in record.texts.items()},
    }
