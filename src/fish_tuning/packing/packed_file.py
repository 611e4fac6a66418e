"""The file that `pack` writes, and how to read one that may be damaged or come from a stranger.

It is a safetensors file of four flat uint8 tensors:

- ``record``: a `Record`, as deflated JSON;
- ``values``: the selected entries of every tensor, in the order of the weights file;
- ``stored``: frozen entries that cannot be rebuilt from anything else, in the same order;
- ``bits``: the deflated data of `fish_mask.safetensors`.

The key ``fish_tuning_pack`` of its metadata holds the format's version and the SHA-256 of the four
tensors. All numbers are little-endian, as in any safetensors file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import safetensors.numpy
from pydantic import Field, NonNegativeInt, ValidationError

from fish_tuning.mask.files import first_problem
from fish_tuning.packing.safetensors_layout import (
    Bytes,
    Slot,
    Strict,
    num_bytes,
    read_layout,
    split_safetensors,
)

FORMAT = "fish_tuning_pack"
FORMAT_VERSION = 1

RECORD_LIMIT = 2**26
"""Maximum size of the inflated record in bytes: names and shapes of some 100,000 tensors."""

WeightsName = Literal["adapter_model.safetensors", "model.safetensors"]
TextName = Literal[
    "README.md", "adapter_config.json", "config.json", "fish_mask.json", "generation_config.json"
]
Source = Literal["constant", "seed", "start", "stored"]
Rounding = Literal["bfloat16", "float16"]

Latin1 = Annotated[str, Field(pattern=r"^[\x00-\xff]*$")]
"""Bytes, decoded as Latin-1."""


class TensorRecord(Strict):
    """How one tensor of the weights file is rebuilt."""

    mask: str | None = Field(description="Its name in the mask. None: no entry is selected.")
    frozen: Source | None = Field(description="Where its frozen entries come from, if it has any.")
    fill: NonNegativeInt = Field(default=0, description="The constant, its bits as an integer.")
    rounded: Rounding | None = Field(
        default=None, description="Type that the seed's or start's tensor is first rounded to."
    )


class Record(Strict):
    """Everything but the numbers. Text files are decoded as Latin-1, which keeps their bytes."""

    weights_name: WeightsName
    weights_header: Latin1 = Field(description="The safetensors header of the weights file.")
    weights_sha256: str = Field(description="SHA-256 of the complete weights file, in hex.")
    mask_header: Latin1 = Field(description="The safetensors header of fish_mask.safetensors.")
    texts: dict[TextName, Latin1] = Field(description="The contents of small files, by name.")
    tensors: list[TensorRecord] = Field(description="One per tensor, in the order of the data.")
    seed: int | None = Field(description="What torch is seeded with before the adapter is added.")
    versions: dict[str, str] = Field(
        description="Versions of the packages that draw the seed's numbers."
    )


@dataclass(frozen=True)
class PackedFile:
    """The contents of a packed file."""

    record: Record
    values: Bytes
    stored: Bytes
    bits: Bytes

    @functools.cached_property
    def slots(self) -> list[Slot]:
        """The tensors of the weights file, in the order of `record.tensors`."""
        return read_layout(self.record.weights_header.encode("latin-1"))

    def to_bytes(self) -> bytes:
        """Serialize to the content of a file."""
        parts = {
            "record": _deflated(self.record.model_dump_json(exclude_defaults=True).encode()),
            "values": self.values,
            "stored": self.stored,
            "bits": _deflated(self.bits.tobytes()),
        }
        metadata = {"format_version": FORMAT_VERSION, "sha256": _digest(parts)}
        return safetensors.numpy.save(parts, {FORMAT: json.dumps(metadata)})

    @classmethod
    def from_bytes(cls, content: bytes, path: Path) -> PackedFile:
        """Read the content of a file; nothing larger is allocated before it has been checked.

        Raises:
            ValueError: The content is damaged, of another kind or of another version; the message
                names `path`.
        """
        try:
            header, data = split_safetensors(content)
        except ValueError as error:
            raise unusable(path, str(error)) from error
        metadata = _metadata(header)
        _check_version(metadata, path)
        parts = {slot.name: data[slot.data] for slot in read_layout(header)}
        if parts.keys() != {"record", "values", "stored", "bits"}:
            raise unusable(path, "it does not have the four parts of a packed file")
        if _digest(parts) != metadata.get("sha256"):
            raise unusable(path, "its content does not have the sha256 that it records")
        try:
            record = Record.model_validate_json(_inflated(parts["record"], RECORD_LIMIT).tobytes())
            size = num_bytes(read_layout(record.mask_header.encode("latin-1")))
            bits = _inflated(parts["bits"], size)
            packed = cls(record, parts["values"], parts["stored"], bits)
            if len(packed.slots) != len(record.tensors):
                raise ValueError("its record does not list the tensors of its weights")
            return packed
        except ValidationError as error:
            raise unusable(path, f"its record is wrong at {first_problem(error)}") from error
        except ValueError as error:
            raise unusable(path, str(error)) from error


def unusable(path: Path, problem: str) -> ValueError:
    """Return the error for a packed file that cannot be read."""
    return ValueError(
        f"{path} cannot be used: {problem}. Fetch or copy it again, or pack the model again."
    )


def _metadata(header: bytes) -> dict[str, Any]:
    """Return what the metadata says about the format; nothing if the file is of another kind."""
    try:
        metadata = json.loads(json.loads(header)["__metadata__"][FORMAT])
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _check_version(metadata: dict[str, Any], path: Path) -> None:
    if not metadata:
        raise unusable(path, "it is not a file that fish-tuning pack wrote")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {metadata.get('format_version')!r}, but this version of "
            f"fish-tuning reads {FORMAT_VERSION}. Unpack it with the version that packed it."
        )


def _digest(parts: dict[str, Bytes]) -> str:
    sha256 = hashlib.sha256()
    for name in ("record", "values", "stored", "bits"):
        # The lengths are hashed too, so that no byte can move from one part to the next.
        sha256.update(f"{name}:{len(parts[name])}:".encode())
        sha256.update(np.ascontiguousarray(parts[name]).data)
    return sha256.hexdigest()


def _deflated(content: bytes) -> Bytes:
    return np.frombuffer(zlib.compress(content, 9), np.uint8)


def _inflated(part: Bytes, limit: int) -> Bytes:
    """Inflate a part, but never to more than `limit` bytes."""
    stream = zlib.decompressobj()
    try:
        # One byte more than allowed: 0 would mean no limit.
        content = stream.decompress(part.tobytes(), limit + 1)
    except zlib.error as error:
        raise ValueError(f"a part cannot be inflated ({error})") from error
    if not stream.eof or len(content) > limit:
        raise ValueError(f"a part does not inflate to at most {limit:,} bytes")
    return np.frombuffer(content, np.uint8)
