"""The two files of a mask: bits in safetensors, and a JSON record of names, shapes and counts."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    ValidationError,
    field_validator,
)
from safetensors import SafetensorError
from torch import Tensor

from fish_tuning import __version__
from fish_tuning.atomic import write_atomically

BITS_FILE = "fish_mask.safetensors"
JSON_FILE = "fish_mask.json"
FORMAT_VERSION = 1


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str
    shape: list[NonNegativeInt]
    num_selected: int

    @field_validator("shape")
    @classmethod
    def _fits_in_torch(cls, shape: list[int]) -> list[int]:
        # A zero must not hide another dimension that is too large.
        if len(shape) > 64 or math.prod(max(size, 1) for size in shape) >= 2**63:
            raise ValueError("torch has no tensor of this shape")
        return shape


class _Record(BaseModel):
    model_config = ConfigDict(strict=True)

    num_trainable: int
    num_entries: int
    sha256: str
    weights: dict[str, str] = {}
    provenance: dict[Any, Any]
    tensors: Annotated[list[_Entry], Field(min_length=1)]


def write_mask(
    folder: Path,
    tensors: Mapping[str, Tensor],
    provenance: Mapping[str, Any],
    weights: Iterable[Path] = (),
) -> None:
    """Write the two files of a mask; see `FishMask.save_pretrained`."""
    bits = np.concatenate([np.packbits(t.cpu().numpy().reshape(-1)) for t in tensors.values()])
    entries = [
        {"name": name, "shape": list(tensor.shape), "num_selected": count(tensor)}
        for name, tensor in tensors.items()
    ]
    record = {
        "format_version": FORMAT_VERSION,
        "fish_tuning_version": __version__,
        "num_trainable": sum(count(tensor) for tensor in tensors.values()),
        "num_entries": sum(tensor.numel() for tensor in tensors.values()),
        "sha256": hashlib.sha256(bits.data).hexdigest(),
        "weights": {path.name: _sha256(path) for path in weights},
        "provenance": provenance,
        "tensors": entries,
    }
    write_atomically(folder / BITS_FILE, safetensors.torch.save({"bits": torch.from_numpy(bits)}))
    # The record comes last: its hash vouches for the bits, so an interrupted save is noticed.
    write_atomically(folder / JSON_FILE, (json.dumps(record, indent=2) + "\n").encode())


def check_weights(record_path: Path, record_content: bytes) -> None:
    """Check that the weights beside a mask are those with which it was saved.

    Somebody who knows nothing of masks may have saved others into the same folder. Without them,
    there is nothing to check: a mask may be copied alone.

    Raises:
        ValueError: They are others.
    """
    for name, expected in _read_record(record_path, record_content).weights.items():
        path = record_path.parent / name
        if path.name == name and path.is_file() and _sha256(path) != expected:
            raise ValueError(
                f"{path} was damaged, or saved again without the mask beside it, which describes "
                f"other weights: delete {JSON_FILE} and {BITS_FILE}, or save the masked model "
                "there again"
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_mask(
    record_content: bytes, bits_content: bytes, record_path: Path, bits_path: Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the contents of the two files; see `FishMask.from_bytes`.

    They may be damaged or come from a stranger: nothing larger than the files is allocated before
    they have been checked.

    Returns:
        The boolean tensors by parameter name, on the CPU, and the provenance.
    """
    record = _read_record(record_path, record_content)
    bits = _read_bits(bits_path, bits_content)
    sizes = [math.prod(entry.shape) for entry in record.tensors]
    if len(bits) != (expected := sum(_num_bytes(size) for size in sizes)):
        raise unusable(
            bits_path,
            f"it holds {len(bits):,} bytes of bits where {JSON_FILE} lists {expected:,}",
        )
    if hashlib.sha256(bits.data).hexdigest() != record.sha256:
        raise unusable(bits_path, f"its bits do not have the sha256 that {JSON_FILE} records")
    tensors = {}
    offset = 0
    for entry, size in zip(record.tensors, sizes, strict=True):
        packed = bits[offset : (offset := offset + _num_bytes(size))]
        flat = torch.from_numpy(np.unpackbits(packed, count=size).view(np.bool_))
        tensors[entry.name] = flat.view(entry.shape)
        if (found := count(flat)) != entry.num_selected:
            raise unusable(
                record_path,
                f"{entry.name} has {found:,} entries selected, but its num_selected is "
                f"{entry.num_selected:,}",
            )
    num_trainable = sum(entry.num_selected for entry in record.tensors)
    totals = {"num_trainable": num_trainable, "num_entries": sum(sizes)}
    for key, found in totals.items():
        if found != (recorded := getattr(record, key)):
            raise unusable(record_path, f"{key} of its tensors is {found:,}, not {recorded:,}")
    return tensors, record.provenance


def unusable(path: Path, problem: str) -> ValueError:
    """Return the error for a mask file that cannot be used."""
    return ValueError(
        f"{path} cannot be used: {problem}. Fetch or copy {BITS_FILE} and {JSON_FILE} again, "
        "both from the same save, or make a new mask."
    )


def first_problem(error: ValidationError) -> str:
    """Describe the first thing that pydantic found wrong: where, and what was expected."""
    details = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, details['loc']))}: {details['msg']}"


def count(mask: Tensor) -> int:
    """Count the True entries."""
    return int(torch.count_nonzero(mask))


def _num_bytes(num_bits: int) -> int:
    return -(-num_bits // 8)


def _read_bits(path: Path, content: bytes) -> NDArray[np.uint8]:
    try:
        # Not through torch, which lacks some of the format's types.
        tensors = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
        bits = dict(tensors).get("bits")
    except SafetensorError as error:
        raise unusable(path, f"it is not a complete safetensors file ({error})") from error
    if bits is None or bits["dtype"] != "U8" or len(bits["shape"]) != 1:
        raise unusable(path, 'it has no flat uint8 tensor "bits"')
    return np.frombuffer(bits["data"], np.uint8)


def _read_record(path: Path, content: bytes) -> _Record:
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise unusable(path, f"it is not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise unusable(path, "it does not hold a JSON object")
    if raw.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {raw.get('format_version')!r}, but this version of "
            f"fish-tuning reads {FORMAT_VERSION}. Save the mask again with this version, or "
            "install the version that wrote it."
        )
    try:
        record = _Record.model_validate(raw)
    except ValidationError as error:
        raise unusable(path, f"it is wrong at {first_problem(error)}") from error
    if len({entry.name for entry in record.tensors}) != len(record.tensors):
        raise unusable(path, '"tensors" lists a name twice')
    return record
