"""Rebuild the weights file from a packed file, and check it."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fish_tuning.mask import FishMask
from fish_tuning.mask.files import JSON_FILE
from fish_tuning.packing.packed_file import PackedFile, Rounding, Source, unusable
from fish_tuning.packing.safetensors_layout import Slot, Words, join_safetensors, num_bytes
from fish_tuning.packing.start import VERSIONED

_EXTERNAL_SOURCES: tuple[Source, ...] = ("seed", "start")


def rebuild(
    packed: PackedFile, path: Path, source: Callable[[Source], Mapping[str, Tensor]]
) -> bytes:
    """Rebuild the weights file that was packed.

    Args:
        packed: The packed file.
        path: What error messages call it.
        source: Returns the tensors before training, from "seed" or "start". It is called only for
            a source that the file needs.

    Returns:
        The content of the weights file, which has the recorded hash.

    Raises:
        ValueError: The parts of the packed file contradict each other, or a source holds other
            tensors than the one that the file was packed with.
    """
    record = packed.record
    try:
        mask = FishMask.from_bytes(
            record.texts.get("fish_mask.json", "").encode("latin-1"),
            join_safetensors(record.mask_header.encode("latin-1"), packed.bits),
        )
        _check_sizes(packed, mask)
    except ValueError as error:
        raise unusable(path, f"its parts do not fit together ({error})") from error
    used = {tensor.frozen for tensor in record.tensors}
    sources = {name: source(name) for name in _EXTERNAL_SOURCES if name in used}
    tensors = list(zip(packed.slots, record.tensors, strict=True))
    # Before anything is allocated: the size of these tensors is only a claim of the file.
    for slot, tensor in tensors:
        if tensor.frozen in sources and _find(slot, sources[tensor.frozen]) is None:
            raise _other_start(packed, path, f"{slot.name} of shape {slot.shape} is not in it")

    data = np.empty(num_bytes(packed.slots), np.uint8)
    values, stored = packed.values, packed.stored
    for slot, tensor in tensors:
        words = data[slot.data].view(slot.word)
        selected = selected_entries(slot, tensor.mask, mask)
        size = int(selected.sum()) * slot.word.itemsize
        words[selected], values = values[:size].view(slot.word), values[size:]
        if tensor.frozen == "constant":
            words[~selected] = tensor.fill
        elif tensor.frozen == "stored":
            size = slot.data.stop - slot.data.start - size
            words[~selected], stored = stored[:size].view(slot.word), stored[size:]
        elif tensor.frozen is not None:
            before = entries_of(slot, sources[tensor.frozen], tensor.rounded)
            assert before is not None
            words[~selected] = before[~selected]
    weights = join_safetensors(record.weights_header.encode("latin-1"), data)
    if hashlib.sha256(weights).hexdigest() != record.weights_sha256:
        problem = "the weights rebuilt with it do not have the sha256 recorded"
        raise _other_start(packed, path, problem) if sources else unusable(path, problem)
    return weights


def _check_sizes(packed: PackedFile, mask: FishMask) -> None:
    """Check that the parts of a file have the sizes that its record and mask say."""
    selected = stored = 0
    for slot, tensor in zip(packed.slots, packed.record.tensors, strict=True):
        check_shape(slot, tensor.mask, mask)
        count = 0 if tensor.mask is None else int(mask[tensor.mask].sum())
        frozen = slot.num_entries - count
        if (tensor.frozen is None) != (frozen == 0):
            raise ValueError(f"{slot.name} has {frozen:,} frozen entries from {tensor.frozen}")
        if tensor.frozen == "constant" and (
            tensor.mask is None or tensor.fill >= 2 ** (8 * slot.word.itemsize)
        ):
            raise ValueError(f"{slot.name} cannot be filled with a constant")
        selected += count * slot.word.itemsize
        stored += frozen * slot.word.itemsize if tensor.frozen == "stored" else 0
    for part, expected in ((packed.values, selected), (packed.stored, stored)):
        if len(part) != expected:
            raise ValueError(f"a part has {len(part):,} bytes instead of {expected:,}")


def _other_start(packed: PackedFile, path: Path, problem: str) -> ValueError:
    record = packed.record
    used = {tensor.frozen for tensor in record.tensors}
    advice = []
    if "seed" in used:
        recorded = ", ".join(f"{name} {version}" for name, version in record.versions.items())
        here = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONED)
        advice.append(
            f"the start that seed {record.seed} draws: unpack with the base model and the versions "
            f"that it was packed with ({recorded}; here {here})"
        )
    if "start" in used:
        advice.append("the start that was named: name the one that it was packed with")
    return ValueError(f"{path} does not fit {', or '.join(advice)}. Found: {problem}")


def check_shape(slot: Slot, name: str | None, mask: FishMask) -> None:
    """Check that the mask lists a tensor with the shape it has in the weights.

    Args:
        slot: The tensor in the weights file.
        name: Its name in the mask; None if the mask does not name it, which is fine.
        mask: The mask.

    Raises:
        ValueError: It does not; the message names the tensor and its shape.
    """
    if name is not None and (name not in mask or mask[name].shape != slot.shape):
        raise ValueError(
            f"{slot.name} has shape {slot.shape}, which {JSON_FILE} does not list for it: the mask "
            "is of other weights"
        )


def selected_entries(slot: Slot, name: str | None, mask: FishMask) -> NDArray[np.bool_]:
    """Return which of a tensor's entries are selected, flattened."""
    if name is None:
        return np.zeros(slot.num_entries, np.bool_)
    flat: NDArray[np.bool_] = mask[name].numpy().reshape(-1)
    return flat


def entries_of(slot: Slot, tensors: Mapping[str, Tensor], rounded: Rounding | None) -> Words | None:
    """Return a tensor's entries before training, flattened and in the type of the weights file.

    The result is None if `tensors` holds no such tensor of this shape.
    """
    if (tensor := _find(slot, tensors)) is None:
        return None
    # A model in half precision rounds its new adapter, which PEFT then keeps in float32.
    if rounded is not None:
        tensor = tensor.to(getattr(torch, rounded))
    flat = tensor.detach().cpu().to(slot.dtype).contiguous().reshape(-1)
    words: Words = flat.view(torch.uint8).numpy().view(slot.word)
    return words


def _find(slot: Slot, tensors: Mapping[str, Tensor]) -> Tensor | None:
    # The checkpoint of a model without a head lacks the first part of the names ("bert.").
    tensor = tensors.get(slot.name, tensors.get(slot.name.partition(".")[2]))
    return tensor if tensor is not None and tuple(tensor.shape) == slot.shape else None
