"""From the folder of a saved adapter or model to a packed file, and back."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import safetensors.torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fish_tuning.atomic import write_atomically, write_new_folder_atomically
from fish_tuning.mask import FishMask
from fish_tuning.mask.files import BITS_FILE, JSON_FILE
from fish_tuning.names import without_adapter
from fish_tuning.packing.packed_file import (
    Bytes,
    PackedFile,
    Plan,
    Record,
    Rounding,
    Slot,
    Source,
    TextName,
    WeightsName,
    Words,
    fault,
    join_safetensors,
    layout,
    split_safetensors,
)
from fish_tuning.packing.rebuild import check_shape, rebuild, selected_entries, words_of
from fish_tuning.packing.start import VERSIONED, draw_start, read_start

logger = logging.getLogger(__name__)

Start = str | os.PathLike[str] | Mapping[str, Tensor]
ModelOrName = str | os.PathLike[str] | nn.Module

ADAPTER_CONFIG: TextName = "adapter_config.json"


@dataclass(frozen=True)
class PackReport:
    """What `pack` did."""

    weights_bytes: int
    """Size of the weights file that was packed."""
    packed_bytes: int
    """Size of the packed file."""
    entries: dict[str, int]
    """Entries by what became of them: "selected", and for frozen ones "constant", "seed" (drawn
    again), "start" (taken from the start) and "stored" (whole)."""
    sizes: dict[str, int]
    """Bytes that the "selected" and the "stored" entries take in the packed file."""
    left_out: tuple[str, ...]
    """Names in the folder that were not packed, a tokenizer's for instance."""


def pack(
    folder: str | os.PathLike[str],
    file: str | os.PathLike[str],
    *,
    seed: int | None = None,
    start: Start | None = None,
    base_model: ModelOrName | None = None,
) -> PackReport:
    """Packs an adapter, or a model, that was saved with its mask into one small file.

    The file holds the selected values, the mask's bits and, for the frozen entries of each tensor,
    the first of these that gives them bit for bit:

    - a constant: LoRA's B, which starts at 0;
    - the seed: PEFT's random start, drawn again. It has to be what torch was seeded with right
      before the adapter was added (`torch.manual_seed(seed)`, then `get_peft_model`);
    - the start: the adapter as it was before training or, for a model's own weights, the model
      that was fine-tuned. Who unpacks needs it too;
    - themselves, stored whole. The log says which and how large they are.

    The file has been unpacked and compared before it is written.

    Args:
        folder: What `save_pretrained` of a masked model, or the Trainer's `save_model`, wrote.
        file: The file to write.
        seed: As above.
        start: Folder of the start's safetensors files, or a state dict.
        base_model: For the seed: the base model, or the folder or hub id of one, of which only the
            config is read; by default the one that the adapter's config names.

    Returns:
        Sizes and counts.

    Raises:
        FileNotFoundError: The folder has no weights or no mask; the start has no weights.
        FileExistsError: The file exists.
        ValueError: A file in the folder is damaged or the mask is of other shapes; the adapter
            cannot be drawn again from a seed.
    """
    folder, file = Path(folder), Path(file)
    if file.exists():
        raise FileExistsError(f"{file} exists: name a new file")
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

    plans: list[Plan] = []
    values: list[Words] = []
    stored: list[Words] = []
    slots = layout(header)
    names = _names_in_mask(slots, mask)
    for slot in slots:
        check_shape(slot, names.get(slot.name), mask)
        words = data[slot.data].view(slot.word)
        selected = selected_entries(slot, names.get(slot.name), mask)
        frozen = words[~selected]
        plan = _plan(slot, names.get(slot.name), frozen, selected, sources)
        plans.append(plan)
        values.append(words[selected])
        if plan.frozen == "stored":
            stored.append(frozen)
    drawn = any(plan.frozen == "seed" for plan in plans)
    record = Record(
        weights_name=weights_name,
        weights_header=header.decode("latin-1"),
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        mask_header=mask_header.decode("latin-1"),
        texts=texts,
        tensors=plans,
        seed=seed if drawn else None,
        versions={name: importlib.metadata.version(name) for name in VERSIONED} if drawn else {},
    )
    content = PackedFile(record, _joined(values), _joined(stored), bits).to_bytes()
    # Read back and checked against the hash: whoever deletes the original relies on it.
    rebuild(PackedFile.from_bytes(content, file), file, lambda source: sources[source])
    write_atomically(file, content)
    tensors = list(zip(slots, plans, strict=True))
    return _report(folder, len(weights), len(content), tensors, values)


def unpack(
    file: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    start: Start | None = None,
    base_model: ModelOrName | None = None,
) -> None:
    """Writes the folder that `pack` was given: the same bytes, or nothing.

    Args:
        file: A file that `pack` wrote.
        folder: The folder to write, which must be new or empty.
        start: The start it was packed with, if it was; as in `pack`.
        base_model: As in `pack`, for a file packed with a seed.

    Raises:
        FileNotFoundError: There is no such file; the start has no weights.
        FileExistsError: The folder holds something.
        ValueError: The file is damaged, of another kind or of another version; the start is
            missing or another one, or the seed gives other numbers here. Nothing is written.
    """
    packed = _read(Path(file))
    write_new_folder_atomically(Path(folder), _contents(packed, Path(file), start, base_model))


def load_packed(
    model: nn.Module,
    file: str | os.PathLike[str],
    *,
    start: Start | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Loads a packed file onto its model.

    Args:
        model: The base model of a packed adapter. For a model's own weights, the model as it was
            before training, which is also the start.
        file: A file that `pack` wrote.
        start: The start of an adapter that was packed with one; as in `pack`.
        **kwargs: For adapters, what `PeftModel.from_pretrained` takes.

    Returns:
        A `PeftModel` over the model, as `PeftModel.from_pretrained` of the unpacked folder
        returns it; for a model's own weights, the same model.

    Raises:
        FileNotFoundError: There is no such file; the start has no weights.
        ValueError: As in `unpack`; or the weights are of another model. The model is unchanged.
    """
    path = Path(file)
    packed = _read(path)
    if packed.record.weights_name == "adapter_model.safetensors":
        from peft import PeftModel

        contents = _contents(packed, path, start, model)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "adapter"
            write_new_folder_atomically(folder, contents)
            return PeftModel.from_pretrained(model, str(folder), **kwargs)
    if kwargs:
        raise TypeError(f"{', '.join(kwargs)}: only an adapter takes further arguments")
    own = model.state_dict()
    contents = _contents(packed, path, start if start is not None else own, None)
    tensors = safetensors.torch.load(contents[packed.record.weights_name])
    # Of tied tensors, files hold one.
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


def _weights_name(folder: Path) -> WeightsName:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: name that of a saved adapter or model")
    for name in get_args(WeightsName):
        if (folder / name).is_file():
            found: WeightsName = name
            return found
    raise FileNotFoundError(
        f"{folder} holds neither {' nor '.join(get_args(WeightsName))}: name the folder of a saved "
        "adapter or model. Files in other formats or in several shards have to be saved anew"
    )


def _names_in_mask(slots: list[Slot], mask: FishMask) -> dict[str, str]:
    """Names in the weights file to names in the mask."""
    saved = {slot.name for slot in slots}
    names = {}
    for name in mask:
        without = without_adapter(name)
        # PEFT drops the end of DoRA's lora_magnitude_vector.default.weight.
        for key in (name, without, without.removesuffix(".weight")):
            if key in saved:
                names[key] = name
                break
    if not names:
        raise ValueError(
            f"{JSON_FILE} names no tensor of the weights (its first is {next(iter(mask))}): the "
            "mask is of another adapter"
        )
    return names


def _plan(
    slot: Slot,
    name: str | None,
    frozen: Words,
    selected: NDArray[np.bool_],
    sources: Mapping[Source, Mapping[str, Tensor]],
) -> Plan:
    if not frozen.size:
        return Plan(mask=name, frozen=None)
    # Without bits of its own in the file a tensor could be of any size, so that one is stored.
    if name is not None and (frozen == frozen[0]).all():
        return Plan(mask=name, frozen="constant", fill=int(frozen[0]))
    roundings: tuple[Rounding | None, ...] = (None, *get_args(Rounding))
    for source, tensors in sources.items():
        for rounded in roundings:
            there = words_of(slot, tensors, rounded)
            if there is not None and np.array_equal(there[~selected], frozen):
                return Plan(mask=name, frozen=source, rounded=rounded)
    return Plan(mask=name, frozen="stored")


def _joined(parts: list[Words]) -> Bytes:
    return np.frombuffer(b"".join(part.tobytes() for part in parts), np.uint8)


def _read(path: Path) -> PackedFile:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name a file that fish-tuning pack wrote")
    return PackedFile.from_bytes(path.read_bytes(), path)


def _contents(
    packed: PackedFile, path: Path, start: Start | None, base_model: ModelOrName | None
) -> dict[str, bytes]:
    """The files that were packed, by name."""

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
            raise fault(path, f"its record lacks a seed or {ADAPTER_CONFIG}")
        return draw_start(config, seed, base_model)

    record = packed.record
    return {
        record.weights_name: rebuild(packed, path, source),
        BITS_FILE: join_safetensors(record.mask_header.encode("latin-1"), packed.bits),
        **{name: text.encode("latin-1") for name, text in record.texts.items()},
    }


def _report(
    folder: Path,
    weights_bytes: int,
    packed_bytes: int,
    tensors: list[tuple[Slot, Plan]],
    values: list[Words],
) -> PackReport:
    entries = dict.fromkeys(("selected", *get_args(Source)), 0)
    sizes = dict.fromkeys(("selected", "stored"), 0)
    stored = []
    for (slot, plan), chosen in zip(tensors, values, strict=True):
        frozen = slot.num_entries - chosen.size
        entries["selected"] += chosen.size
        sizes["selected"] += chosen.nbytes
        if plan.frozen is not None:
            entries[plan.frozen] += frozen
        if plan.frozen == "stored":
            stored.append(slot.name)
            sizes["stored"] += frozen * slot.word.itemsize
    if stored:
        logger.warning(
            "%s frozen entries (%s bytes) of %d tensors are stored whole, as neither a constant "
            "nor a seed or start that was given yields them: %s",
            f"{entries['stored']:,}",
            f"{sizes['stored']:,}",
            len(stored),
            ", ".join(stored[:3]) + (", ..." if len(stored) > 3 else ""),
        )
    packed = {*get_args(TextName), *get_args(WeightsName), BITS_FILE}
    left_out = sorted(path.name for path in folder.iterdir() if path.name not in packed)
    return PackReport(weights_bytes, packed_bytes, entries, sizes, tuple(left_out))
