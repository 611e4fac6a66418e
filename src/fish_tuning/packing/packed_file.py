"""The file that `pack` writes: its parts, and how they are read from a file nobody vouches for.

It is a safetensors file of four flat uint8 tensors:

- ``record``: deflated JSON, a `Record`;
- ``values``: the selected entries, tensor after tensor in the order of the weights file;
- ``stored``: frozen entries that nothing rebuilds, in the same order;
- ``bits``: the deflated data of `fish_mask.safetensors`.

One key of its metadata, ``fish_tuning_pack``, holds the format's version and the SHA-256 of the
four. Numbers are little-endian throughout, as safetensors has them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, TypeAdapter, ValidationError

FORMAT = "fish_tuning_pack"
FORMAT_VERSION = 1

RECORD_LIMIT = 2**26
"""Bytes of the inflated record: names and shapes of some 100,000 tensors."""

Bytes: TypeAlias = NDArray[np.uint8]
Words: TypeAlias = NDArray[Any]
"""Entries as unsigned integers of their size: what is compared and copied is bits."""

WeightsName = Literal["adapter_model.safetensors", "model.safetensors"]
TextName = Literal[
    "README.md", "adapter_config.json", "config.json", "fish_mask.json", "generation_config.json"
]
Source = Literal["constant", "seed", "start", "stored"]
Rounding = Literal["bfloat16", "float16"]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


Latin1 = Annotated[str, Field(pattern=r"^[\x00-\xff]*$")]
"""Bytes, decoded as Latin-1."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Plan(_Strict):
    """How one tensor of the weights file is rebuilt."""

    mask: str | None = Field(description="Its name in the mask; None: no entry is selected.")
    frozen: Source | None = Field(description="Where frozen entries come from, if it has any.")
    fill: NonNegativeInt = Field(default=0, description="The constant, its bits as an integer.")
    rounded: Rounding | None = Field(
        default=None, description="A type that seed's or start's tensor is rounded to first."
    )


class Record(_Strict):
    """Everything that is not numbers. Texts of files are decoded as Latin-1, which keeps bytes."""

    weights_name: WeightsName
    weights_header: Latin1 = Field(description="The safetensors header of the weights file.")
    weights_sha256: str = Field(description="SHA-256 of the whole weights file, in hex.")
    mask_header: Latin1 = Field(description="The safetensors header of fish_mask.safetensors.")
    texts: dict[TextName, Latin1] = Field(description="Small files as they are.")
    tensors: list[Plan] = Field(description="One for each tensor, in the order of the data.")
    seed: int | None = Field(description="What torch is seeded with before the adapter is added.")
    versions: dict[str, str] = Field(description="Of the packages that rebuild from the seed.")


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in the data of a safetensors file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    data: slice
    """In bytes."""

    @property
    def num_entries(self) -> int:
        """Entries of the tensor, selected or not."""
        return math.prod(self.shape)

    @property
    def word(self) -> np.dtype[Any]:
        """An unsigned integer of an entry's size."""
        return np.dtype(f"<u{self.dtype.itemsize}")


class _Entry(_Strict):
    dtype: str
    shape: list[NonNegativeInt]
    data_offsets: Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]


_ENTRIES = TypeAdapter(dict[str, _Entry])


def split_safetensors(content: bytes) -> tuple[bytes, Bytes]:
    """The header and the data of a safetensors file.

    Raises:
        ValueError: The file is cut short or its header is not one; the message names no file.
    """
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > len(content) - 8:
        raise ValueError("it is not a whole safetensors file")
    header, data = content[8 : 8 + size], np.frombuffer(content, np.uint8, offset=8 + size)
    if (expected := num_bytes(layout(header))) != len(data):
        raise ValueError(f"it holds {len(data):,} bytes of data where {expected:,} belong")
    return header, data


def join_safetensors(header: bytes, data: Bytes) -> bytes:
    """The inverse of `split_safetensors`."""
    return b"".join([len(header).to_bytes(8, "little"), header, data.data])


def layout(header: bytes) -> list[Slot]:
    """The tensors of a safetensors file in the order of their data, which has no gaps.

    Raises:
        ValueError: The header is damaged or has a dtype that is not in `DTYPES`; the message
            names no file.
    """
    try:
        record = json.loads(header)
        if isinstance(record, dict):
            record.pop("__metadata__", None)
        entries = _ENTRIES.validate_python(record)
    except (ValueError, RecursionError) as error:
        raise ValueError("its header is damaged") from error
    slots: list[Slot] = []
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if (dtype := DTYPES.get(entry.dtype)) is None:
            raise ValueError(f"{name} is of type {entry.dtype}, which is not supported")
        start, end_before = entry.data_offsets[0], end
        end = entry.data_offsets[1]
        if start != end_before or end - start != math.prod(entry.shape) * dtype.itemsize:
            raise ValueError(f"the offsets of {name} in its header are wrong")
        slots.append(Slot(name, dtype, tuple(entry.shape), slice(start, end)))
    return slots


def num_bytes(slots: list[Slot]) -> int:
    """Size of the data."""
    return slots[-1].data.stop if slots else 0


@dataclass(frozen=True)
class PackedFile:
    """A packed file in memory."""

    record: Record
    values: Bytes
    stored: Bytes
    bits: Bytes

    @functools.cached_property
    def slots(self) -> list[Slot]:
        """The tensors of the weights file, in the order of `record.tensors`."""
        return layout(self.record.weights_header.encode("latin-1"))

    def to_bytes(self) -> bytes:
        """The file's content."""
        parts = {
            "record": _deflated(self.record.model_dump_json(exclude_defaults=True).encode()),
            "values": self.values,
            "stored": self.stored,
            "bits": _deflated(self.bits.tobytes()),
        }
        about = {"format_version": FORMAT_VERSION, "sha256": _digest(parts)}
        return safetensors.numpy.save(parts, {FORMAT: json.dumps(about)})

    @classmethod
    def from_bytes(cls, content: bytes, path: Path) -> PackedFile:
        """Read a file's content; nothing larger than it is allocated before it is checked.

        Raises:
            ValueError: The content is damaged, of another kind or of another version; the message
                names `path`.
        """
        try:
            header, data = split_safetensors(content)
        except ValueError as error:
            raise fault(path, str(error)) from error
        _check_version(header, path)
        parts = {slot.name: data[slot.data] for slot in layout(header)}
        if parts.keys() != {"record", "values", "stored", "bits"}:
            raise fault(path, "it does not have the four parts of a packed file")
        if _digest(parts) != _about(header).get("sha256"):
            raise fault(path, "its content does not have the sha256 that it records")
        try:
            record = Record.model_validate_json(_inflated(parts["record"], RECORD_LIMIT).tobytes())
            size = num_bytes(layout(record.mask_header.encode("latin-1")))
            bits = _inflated(parts["bits"], size)
            packed = cls(record, parts["values"], parts["stored"], bits)
            if len(packed.slots) != len(record.tensors):
                raise ValueError("its record does not list the tensors of its weights")
            return packed
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise fault(path, f"its record is wrong at {where}: {first['msg']}") from error
        except ValueError as error:
            raise fault(path, str(error)) from error


def fault(path: Path, problem: str) -> ValueError:
    """The error of a packed file that cannot be read."""
    return ValueError(f"{path} cannot be used: {problem}. Fetch or copy it again, or pack anew.")


def _about(header: bytes) -> dict[str, Any]:
    """What the metadata says of the format; empty if the file is of another kind."""
    try:
        about = json.loads(json.loads(header)["__metadata__"][FORMAT])
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def _check_version(header: bytes, path: Path) -> None:
    about = _about(header)
    if not about:
        raise fault(path, "it is not a file that fish-tuning pack wrote")
    if about.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {about.get('format_version')!r}, and this version of "
            f"fish-tuning reads {FORMAT_VERSION}. Unpack it with the version that packed it."
        )


def _digest(parts: dict[str, Bytes]) -> str:
    sha256 = hashlib.sha256()
    for name in ("record", "values", "stored", "bits"):
        # With the lengths, so that no byte can pass from one part to the next.
        sha256.update(f"{name}:{len(parts[name])}:".encode())
        sha256.update(np.ascontiguousarray(parts[name]).data)
    return sha256.hexdigest()


def _deflated(content: bytes) -> Bytes:
    return np.frombuffer(zlib.compress(content, 9), np.uint8)


def _inflated(part: Bytes, limit: int) -> Bytes:
    """At most `limit` bytes, whatever the part would inflate to."""
    stream = zlib.decompressobj()
    try:
        # 0 stands for no limit.
        content = stream.decompress(part.tobytes(), limit + 1)
    except zlib.error as error:
        raise ValueError(f"a part cannot be inflated ({error})") from error
    if not stream.eof or len(content) > limit:
        raise ValueError(f"a part does not inflate to the {limit:,} bytes at most that belong")
    return np.frombuffer(content, np.uint8)
