"""From the folder of a saved adapter or model to a packed file."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fish_tuning.arguments import check_type
from fish_tuning.atomic import write_atomically
from fish_tuning.mask import FishMask
from fish_tuning.mask.files import BITS_FILE, JSON_FILE
from fish_tuning.names import without_adapter
from fish_tuning.packing.packed_file import (
    PackedFile,
    Record,
    Rounding,
    Source,
    TensorRecord,
    TextName,
    WeightsName,
)
from fish_tuning.packing.rebuild import check_shape, entries_of, rebuild, selected_entries
from fish_tuning.packing.safetensors_layout import (
    Bytes,
    Slot,
    Words,
    read_layout,
    split_safetensors,
)
from fish_tuning.packing.start import (
    ADAPTER_CONFIG,
    VERSIONED,
    ModelOrName,
    Start,
    draw_start,
    read_start,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackReport:
    """What `pack` did.

    Attributes:
        weights_bytes: Size of the weights file that was packed.
        packed_bytes: Size of the packed file.
        entries: Number of entries by what became of them: "selected", or frozen and "constant",
            "seed" (drawn again), "start" (taken from the start) or "stored" (kept in the file).
        sizes: Bytes that the "selected" and the "stored" entries take in the packed file.
        left_out: Names of files in the folder that were not packed, such as a tokenizer's.
    """

    weights_bytes: int
    packed_bytes: int
    entries: dict[str, int]
    sizes: dict[str, int]
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class _SavedFolder:
    """The files to pack: weights and mask, both also split into header and data, and texts."""

    weights_name: WeightsName
    weights: bytes
    header: bytes
    data: Bytes
    mask: FishMask
    mask_header: bytes
    bits: Bytes
    texts: dict[TextName, str]


@dataclass(frozen=True)
class _PackedTensor:
    """A tensor, how it is rebuilt, and those of its entries that the packed file holds."""

    slot: Slot
    record: TensorRecord
    selected: Words
    stored: Words


def pack(
    folder: str | os.PathLike[str],
    file: str | os.PathLike[str],
    *,
    seed: int | None = None,
    start: Start | None = None,
    base_model: ModelOrName | None = None,
) -> PackReport:
    """Pack an adapter, or a model, that was saved with its mask into one small file.

    The file holds the selected values, the mask's bits and, for the frozen entries of each tensor,
    the first of these that reproduces them bit for bit:

    - a constant: LoRA's B, which starts at 0;
    - the seed: PEFT's random start, drawn again;
    - the start, which is needed again for unpacking;
    - the entries themselves. A warning says which ones and how large they are.

    The file is unpacked and compared before it is written.

    Args:
        folder: What `save_pretrained` of a masked model, or the Trainer's `save_model`, wrote.
        file: The file to write.
        seed: What torch was seeded with right before the adapter was added
            (`torch.manual_seed(seed)`, then `get_peft_model`).
        start: The adapter before training or, for a model's own weights, the model that was
            fine-tuned: a folder of safetensors files, or a state dict.
        base_model: Needed with a seed: the base model, or its folder or hub id, of which only the
            config is read. Default: the one that the adapter's config names.

    Returns:
        Sizes and counts.

    Raises:
        FileNotFoundError: The folder has no weights or no mask, or the start has no weights.
        FileExistsError: The file exists.
        ValueError: A file in the folder is damaged, the mask has other shapes, or the adapter
            cannot be drawn again from a seed.

    Examples:
        >>> generator = torch.manual_seed(0)
        >>> model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS"))
        >>> model = get_fish_model(model, FishConfig(keep_ratio=0.5), loader)
        >>> model.save_pretrained("adapter")
        >>> report = pack("adapter", "packed.safetensors", seed=0, base_model=base)
        >>> unpack("packed.safetensors", "adapter_again", base_model=base)
    """
    check_type("folder", folder, (str, os.PathLike), "the folder of a saved adapter or model")
    folder, file = Path(folder), Path(file)
    if file.exists():
        raise FileExistsError(f"{file} exists: name a new file")
    saved = _read_folder(folder)
    sources = _sources(folder, saved.texts, seed, start, base_model)
    tensors = _pack_tensors(saved, sources)
    content = _packed_content(saved, tensors, seed)
    # Unpacked and compared with the hash, because the original may now be deleted.
    rebuild(PackedFile.from_bytes(content, file), file, lambda source: sources[source])
    write_atomically(file, content)
    return _report(folder, len(saved.weights), len(content), tensors)


def _read_folder(folder: Path) -> _SavedFolder:
    weights_name = _weights_name(folder)
    mask = FishMask.from_pretrained(folder)
    weights = (folder / weights_name).read_bytes()
    try:
        header, data = split_safetensors(weights)
    except ValueError as error:
        raise ValueError(f"{folder / weights_name} cannot be packed: {error}") from error
    mask_header, bits = split_safetensors((folder / BITS_FILE).read_bytes())
    texts: dict[TextName, str] = {
        name: (folder / name).read_bytes().decode("latin-1")
        for name in get_args(TextName)
        if (folder / name).is_file()
    }
    return _SavedFolder(weights_name, weights, header, data, mask, mask_header, bits, texts)


def _weights_name(folder: Path) -> WeightsName:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: name that of a saved adapter or model")
    for name in get_args(WeightsName):
        if (folder / name).is_file():
            found: WeightsName = name
            return found
    raise FileNotFoundError(
        f"{folder} holds neither {' nor '.join(get_args(WeightsName))}: name the folder of a saved "
        "adapter or model. Files in other formats or in several shards must be saved again"
    )


def _sources(
    folder: Path,
    texts: Mapping[TextName, str],
    seed: int | None,
    start: Start | None,
    base_model: ModelOrName | None,
) -> dict[Source, Mapping[str, Tensor]]:
    """Return the tensors before training, from the seed and from the start, if they are given."""
    sources: dict[Source, Mapping[str, Tensor]] = {}
    if seed is not None:
        if ADAPTER_CONFIG not in texts:
            raise ValueError(
                f"{folder} holds no {ADAPTER_CONFIG}: a seed is for adapters. Name the model that "
                "was fine-tuned as the start"
            )
        sources["seed"] = draw_start(texts[ADAPTER_CONFIG], seed, base_model)
    if start is not None:
        sources["start"] = read_start(start)
    return sources


def _pack_tensors(
    saved: _SavedFolder, sources: Mapping[Source, Mapping[str, Tensor]]
) -> list[_PackedTensor]:
    tensors = []
    slots = read_layout(saved.header)
    names = _names_in_mask(slots, saved.mask)
    for slot in slots:
        name = names.get(slot.name)
        check_shape(slot, name, saved.mask)
        words = saved.data[slot.data].view(slot.word)
        selected = selected_entries(slot, name, saved.mask)
        record = _find_source(slot, name, words, selected, sources)
        stored = words[~selected] if record.frozen == "stored" else words[:0]
        tensors.append(_PackedTensor(slot, record, words[selected], stored))
    return tensors


def _names_in_mask(slots: list[Slot], mask: FishMask) -> dict[str, str]:
    """Map names in the weights file to names in the mask."""
    saved = {slot.name for slot in slots}
    names = {name: name for name in mask if name in saved}
    by_adapter: dict[str, dict[str, str]] = {}
    for name in mask.keys() - saved:
        for adapter, short in without_adapter(name):
            # PEFT's files leave out the end of DoRA's lora_magnitude_vector.default.weight too.
            for key in saved.intersection((short, short.removesuffix(".weight"))):
                by_adapter.setdefault(adapter, {})[key] = name
    if "default" not in by_adapter and len(by_adapter) > 1:
        raise ValueError(
            f"{JSON_FILE} is of several adapters ({', '.join(sorted(by_adapter))}): save the mask "
            "of the one whose weights these are, get_mask(model, adapter)"
        )
    adapter = "default" if "default" in by_adapter else next(iter(by_adapter), "")
    names |= by_adapter.get(adapter, {})
    if not names:
        raise ValueError(
            f"{JSON_FILE} names no tensor of the weights (its first is {next(iter(mask))}): the "
            "mask is of another adapter"
        )
    return names


def _find_source(
    slot: Slot,
    name: str | None,
    words: Words,
    selected: NDArray[np.bool_],
    sources: Mapping[Source, Mapping[str, Tensor]],
) -> TensorRecord:
    """Find what reproduces a tensor's frozen entries bit for bit."""
    frozen = words[~selected]
    if not frozen.size:
        return TensorRecord(mask=name, frozen=None)
    # A tensor outside the mask is stored instead: nothing in the file would bound its size.
    if name is not None and (frozen == frozen[0]).all():
        return TensorRecord(mask=name, frozen="constant", fill=int(frozen[0]))
    roundings: tuple[Rounding | None, ...] = (None, *get_args(Rounding))
    for source, tensors in sources.items():
        for rounded in roundings:
            before = entries_of(slot, tensors, rounded)
            if before is not None and np.array_equal(before[~selected], frozen):
                return TensorRecord(mask=name, frozen=source, rounded=rounded)
    return TensorRecord(mask=name, frozen="stored")


def _packed_content(saved: _SavedFolder, tensors: list[_PackedTensor], seed: int | None) -> bytes:
    drawn = any(tensor.record.frozen == "seed" for tensor in tensors)
    record = Record(
        weights_name=saved.weights_name,
        weights_header=saved.header.decode("latin-1"),
        weights_sha256=hashlib.sha256(saved.weights).hexdigest(),
        mask_header=saved.mask_header.decode("latin-1"),
        texts=saved.texts,
        tensors=[tensor.record for tensor in tensors],
        seed=seed if drawn else None,
        versions={name: importlib.metadata.version(name) for name in VERSIONED} if drawn else {},
    )
    values = _concatenated(tensor.selected for tensor in tensors)
    stored = _concatenated(tensor.stored for tensor in tensors)
    return PackedFile(record, values, stored, saved.bits).to_bytes()


def _concatenated(parts: Iterable[Words]) -> Bytes:
    return np.frombuffer(b"".join(part.tobytes() for part in parts), np.uint8)


def _report(
    folder: Path, weights_bytes: int, packed_bytes: int, tensors: list[_PackedTensor]
) -> PackReport:
    entries = dict.fromkeys(("selected", *get_args(Source)), 0)
    for tensor in tensors:
        entries["selected"] += tensor.selected.size
        if tensor.record.frozen is not None:
            entries[tensor.record.frozen] += tensor.slot.num_entries - tensor.selected.size
    sizes = {
        "selected": sum(tensor.selected.nbytes for tensor in tensors),
        "stored": sum(tensor.stored.nbytes for tensor in tensors),
    }
    stored = [tensor.slot.name for tensor in tensors if tensor.record.frozen == "stored"]
    if stored:
        logger.warning(
            "%s frozen entries (%s bytes) of %d tensors are stored in the file, because neither a "
            "constant nor a given seed or start reproduces them: %s",
            f"{entries['stored']:,}",
            f"{sizes['stored']:,}",
            len(stored),
            ", ".join(stored[:3]) + (", ..." if len(stored) > 3 else ""),
        )
    packed = {*get_args(TextName), *get_args(WeightsName), BITS_FILE}
    left_out = sorted(path.name for path in folder.iterdir() if path.name not in packed)
    return PackReport(weights_bytes, packed_bytes, entries, sizes, tuple(left_out))
