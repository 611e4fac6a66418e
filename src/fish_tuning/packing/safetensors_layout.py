"""Take a safetensors file apart into header and data, and put it together again bit for bit."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, TypeAdapter

Bytes: TypeAlias = NDArray[np.uint8]
Words: TypeAlias = NDArray[Any]
"""Entries as unsigned integers of their size, so that bits are compared and copied, not values."""

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


@dataclass(frozen=True)
class Slot:
    """Where a tensor is in the data of a safetensors file; `data` counts bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    data: slice

    @property
    def num_entries(self) -> int:
        """Number of entries of the tensor."""
        return math.prod(self.shape)

    @property
    def word(self) -> np.dtype[Any]:
        """The unsigned integer type of an entry's size."""
        return np.dtype(f"<u{self.dtype.itemsize}")


class Strict(BaseModel):
    """A pydantic model that refuses unknown keys and converts nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Entry(Strict):
    dtype: str
    shape: list[NonNegativeInt]
    data_offsets: Annotated[list[NonNegativeInt], Field(min_length=2, max_length=2)]


_ENTRIES = TypeAdapter(dict[str, _Entry])


def split_safetensors(content: bytes) -> tuple[bytes, Bytes]:
    """Split a safetensors file into its header and its data.

    Raises:
        ValueError: The file is truncated or its header is damaged; the message names no file.
    """
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > len(content) - 8:
        raise ValueError("it is not a complete safetensors file")
    header, data = content[8 : 8 + size], np.frombuffer(content, np.uint8, offset=8 + size)
    if (expected := num_bytes(read_layout(header))) != len(data):
        raise ValueError(f"it holds {len(data):,} bytes of data, but its header lists {expected:,}")
    return header, data


def join_safetensors(header: bytes, data: Bytes) -> bytes:
    """Undo `split_safetensors`."""
    return b"".join([len(header).to_bytes(8, "little"), header, data.data])


def read_layout(header: bytes) -> list[Slot]:
    """Read which tensors a safetensors file holds, in the order of their data without gaps.

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
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if (dtype := DTYPES.get(entry.dtype)) is None:
            raise ValueError(f"{name} is of type {entry.dtype}, which is not supported")
        start, stop = entry.data_offsets
        if start != num_bytes(slots) or stop - start != math.prod(entry.shape) * dtype.itemsize:
            raise ValueError(f"the offsets of {name} in its header are wrong")
        slots.append(Slot(name, dtype, tuple(entry.shape), slice(start, stop)))
    return slots


def num_bytes(slots: list[Slot]) -> int:
    """Return the size of the data."""
    return slots[-1].data.stop if slots else 0
