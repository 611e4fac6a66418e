"""From a packed file to the weights file: the parts are checked, put in place and hashed."""

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
from fish_tuning.packing.packed_file import (
    PackedFile,
    Rounding,
    Slot,
    Source,
    Words,
    fault,
    join_safetensors,
    num_bytes,
)
from fish_tuning.packing.start import VERSIONED

FROM_OUTSIDE: tuple[Source, ...] = ("seed", "start")
"""The sources of frozen entries that a packed file does not hold."""


def rebuild(
    packed: PackedFile, path: Path, source: Callable[[Source], Mapping[str, Tensor]]
) -> bytes:
    """The weights file, checked against its hash; a source is asked for where it is needed."""
    record = packed.record
    try:
        mask = FishMask.from_bytes(
            record.texts.get("fish_mask.json", "").encode("latin-1"),
            join_safetensors(record.mask_header.encode("latin-1"), packed.bits),
        )
        _check(packed, mask)
    except ValueError as error:
        raise fault(path, f"its parts do not fit together ({error})") from error
    tensors = list(zip(packed.slots, record.tensors, strict=True))
    sources = {
        name: source(name)
        for name in FROM_OUTSIDE
        if any(plan.frozen == name for plan in record.tensors)
    }
    for slot, plan in tensors:
        if plan.frozen in sources and words_of(slot, sources[plan.frozen], None) is None:
            raise _other_start(packed, path, f"{slot.name} of shape {slot.shape} is not in it")

    data = np.empty(num_bytes(packed.slots), np.uint8)
    values, stored = packed.values, packed.stored
    for slot, plan in tensors:
        words = data[slot.data].view(slot.word)
        selected = selected_entries(slot, plan.mask, mask)
        size = int(selected.sum()) * slot.word.itemsize
        words[selected], values = values[:size].view(slot.word), values[size:]
        if plan.frozen == "constant":
            words[~selected] = plan.fill
        elif plan.frozen == "stored":
            size = slot.data.stop - slot.data.start - size
            words[~selected], stored = stored[:size].view(slot.word), stored[size:]
        elif plan.frozen is not None:
            there = words_of(slot, sources[plan.frozen], plan.rounded)
            assert there is not None
            words[~selected] = there[~selected]
    weights = join_safetensors(record.weights_header.encode("latin-1"), data)
    if hashlib.sha256(weights).hexdigest() != record.weights_sha256:
        problem = "the weights rebuilt with it do not have the sha256 recorded"
        raise _other_start(packed, path, problem) if sources else fault(path, problem)
    return weights


def _check(packed: PackedFile, mask: FishMask) -> None:
    """Whether the parts of a file have the sizes that each other claim, before any is used."""
    selected = stored = 0
    for slot, plan in zip(packed.slots, packed.record.tensors, strict=True):
        check_shape(slot, plan.mask, mask)
        count = 0 if plan.mask is None else int(mask[plan.mask].sum())
        frozen = slot.num_entries - count
        if (plan.frozen is None) != (frozen == 0):
            raise ValueError(f"{slot.name} has {frozen:,} frozen entries from {plan.frozen}")
        if plan.frozen == "constant" and (
            plan.mask is None or plan.fill >= 2 ** (8 * slot.word.itemsize)
        ):
            raise ValueError(f"{slot.name} cannot be filled with a constant")
        selected += count * slot.word.itemsize
        stored += frozen * slot.word.itemsize if plan.frozen == "stored" else 0
    for part, expected in ((packed.values, selected), (packed.stored, stored)):
        if len(part) != expected:
            raise ValueError(f"a part has {len(part):,} bytes where {expected:,} belong")


def _other_start(packed: PackedFile, path: Path, problem: str) -> ValueError:
    record = packed.record
    advice = []
    if any(plan.frozen == "seed" for plan in record.tensors):
        there = ", ".join(f"{name} {version}" for name, version in record.versions.items())
        here = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in VERSIONED)
        advice.append(
            f"the start that seed {record.seed} draws: unpack with the base model and the versions "
            f"that it was packed with ({there}; here {here})"
        )
    if any(plan.frozen == "start" for plan in record.tensors):
        advice.append("the start that was named: name the one that it was packed with")
    return ValueError(f"{path} does not fit {', or '.join(advice)}. Found: {problem}")


def check_shape(slot: Slot, name: str | None, mask: FishMask) -> None:
    """Refuse a tensor whose mask has another shape.

    Raises:
        ValueError: Names the tensor and its shape.
    """
    if name is not None and (name not in mask or mask[name].shape != slot.shape):
        raise ValueError(
            f"{slot.name} has shape {slot.shape}, which {JSON_FILE} does not list for it: the mask "
            "is of other weights"
        )


def selected_entries(slot: Slot, name: str | None, mask: FishMask) -> NDArray[np.bool_]:
    """Which of a tensor's entries are selected, flat."""
    if name is None:
        return np.zeros(slot.num_entries, np.bool_)
    flat: NDArray[np.bool_] = mask[name].numpy().reshape(-1)
    return flat


def words_of(slot: Slot, tensors: Mapping[str, Tensor], rounded: Rounding | None) -> Words | None:
    """A source's entries in the type of the file, flat; None if it has no such tensor.

    A checkpoint may lack the prefix that a model with a head gives its names ("bert.").
    """
    tensor = tensors.get(slot.name, tensors.get(slot.name.partition(".")[2]))
    if tensor is None or tuple(tensor.shape) != slot.shape:
        return None
    # A model in half precision rounds its adapter, which PEFT then keeps in float32.
    if rounded is not None:
        tensor = tensor.to(getattr(torch, rounded))
    flat = tensor.detach().cpu().to(slot.dtype).contiguous().reshape(-1)
    words: Words = flat.view(torch.uint8).numpy().view(slot.word)
    return words
