"""Which entries of which parameters are trained: the mask and its files."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fish_tuning.atomic import write_atomically

BITS_FILE = "fish_mask.safetensors"
JSON_FILE = "fish_mask.json"
FORMAT_VERSION = 1


class FishMask(Mapping[str, Tensor]):
    """Boolean tensors by parameter name: True entries are trained, False entries stay frozen.

    Every scored tensor is present, in the order given; one left dense is all True. Tensors keep
    their device, and boolean ones are held as they are, not copied.

    Args:
        tensors: Parameter name to a boolean tensor of the parameter's shape, or to a tensor of
            zeros and ones of any dtype.
        provenance: How the mask was made, as values that JSON can hold.

    Raises:
        ValueError: There is no tensor, one holds anything but 0 and 1, or the provenance does
            not fit in JSON.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], *, provenance: Mapping[str, Any] | None = None
    ) -> None:
        if not tensors:
            raise ValueError("A FishMask needs at least one tensor, but the mapping is empty.")
        self._tensors = {name: _as_bool(name, tensor) for name, tensor in tensors.items()}
        try:
            # Through JSON at once: a mask read back has the same provenance as the one saved.
            text = json.dumps(dict(provenance or {}), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"The provenance of a FishMask must fit in JSON: {error}.") from error
        self.provenance: dict[str, Any] = json.loads(text)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __eq__(self, other: object) -> bool:
        """Same names, shapes and bits; order, devices and provenance do not count."""
        if not isinstance(other, FishMask):
            return NotImplemented
        return self.keys() == other.keys() and all(
            torch.equal(tensor, other[name].to(tensor.device)) for name, tensor in self.items()
        )

    def __repr__(self) -> str:
        return f"FishMask({self.num_trainable:,} of {self.num_entries:,} in {len(self)} tensors)"

    @property
    def num_trainable(self) -> int:
        """Number of True entries, those of tensors left dense included."""
        return sum(_count(tensor) for tensor in self.values())

    @property
    def num_entries(self) -> int:
        """Number of entries of all tensors."""
        return sum(tensor.numel() for tensor in self.values())

    @property
    def density(self) -> float:
        """Fraction of all entries that is True."""
        return self.num_trainable / max(1, self.num_entries)

    def summary(self) -> str:
        """Readable counts: in all, by layer (the path up to its first number) and by tensor."""
        # Last components stay out of it: they are all that a lone tensor has to show.
        columns = zip(*(name.split(".")[:-1] for name in self), strict=False)
        prefix = "".join(f"{c[0]}." for c in takewhile(lambda c: len(set(c)) == 1, columns))
        counts = [(_count(tensor), tensor.numel()) for tensor in self.values()]
        layers: dict[str, tuple[int, int]] = {}
        for name, (selected, entries) in zip(self, counts, strict=True):
            before = layers.get(layer := _layer(name), (0, 0))
            layers[layer] = (before[0] + selected, before[1] + entries)
        total = (sum(selected for selected, _ in counts), sum(entries for _, entries in counts))
        return "\n".join(
            [
                f"{total[0]:,} of {total[1]:,} entries selected ({total[0] / max(1, total[1]):.2%})"
                f" in {len(self)} tensors",
                "",
                *_table("layer", layers.items()),
                "",
                *_table(
                    f"tensor (after {prefix})" if prefix else "tensor",
                    zip((name.removeprefix(prefix) for name in self), counts, strict=True),
                ),
            ]
        )

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `fish_mask.safetensors` and `fish_mask.json` into a folder, made if need be.

        The first holds one uint8 tensor, "bits": the flat bits of every tensor, first entry in
        the highest bit (`numpy.packbits`), each tensor padded to a byte, in the mask's order. The
        second holds names, shapes, counts, the SHA-256 of the bits and the provenance.

        Args:
            directory: A local folder; earlier mask files in it are replaced, each atomically.
        """
        folder = Path(directory)
        bits = np.concatenate([np.packbits(t.cpu().numpy().reshape(-1)) for t in self.values()])
        tensors = [
            {"name": name, "shape": list(tensor.shape), "num_selected": _count(tensor)}
            for name, tensor in self.items()
        ]
        record = {
            "format_version": FORMAT_VERSION,
            "fish_tuning_version": _package_version(),
            "num_trainable": self.num_trainable,
            "num_entries": self.num_entries,
            "sha256": hashlib.sha256(bits.data).hexdigest(),
            "provenance": self.provenance,
            "tensors": tensors,
        }
        write_atomically(
            folder / BITS_FILE, safetensors.torch.save({"bits": torch.from_numpy(bits)})
        )
        # Last: it vouches for the bits, so a save cut short never passes for a whole one.
        write_atomically(folder / JSON_FILE, (json.dumps(record, indent=2) + "\n").encode())

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> FishMask:
        """Read a mask that `save_pretrained` wrote, onto the CPU.

        Args:
            directory: A local folder or, where there is none of that name, a repository id on the
                Hugging Face hub.
            revision: Branch, tag or commit on the hub.
            token: Access token for the hub; True takes the stored one.

        Returns:
            The mask, checked against its own record.

        Raises:
            FileNotFoundError: One of the two files is missing.
            ValueError: A file is damaged, is of another format version, or does not fit the
                other.
        """
        record_path = _locate(directory, JSON_FILE, revision, token)
        bits_path = _locate(directory, BITS_FILE, revision, token)
        return cls.from_bytes(
            record_path.read_bytes(), bits_path.read_bytes(), record_path, bits_path
        )

    @classmethod
    def from_bytes(
        cls,
        record_content: bytes,
        bits_content: bytes,
        record_path: Path = Path(JSON_FILE),
        bits_path: Path = Path(BITS_FILE),
    ) -> FishMask:
        """Read a mask from the contents of the two files that `save_pretrained` wrote.

        Args:
            record_content: What `fish_mask.json` holds.
            bits_content: What `fish_mask.safetensors` holds.
            record_path: What errors call the first.
            bits_path: What they call the second.

        Returns:
            The mask, checked against its own record.

        Raises:
            ValueError: As in `from_pretrained`.
        """
        record = _read_record(record_path, record_content)
        bits = _read_bits(bits_path, bits_content)
        sizes = [math.prod(entry["shape"]) for entry in record["tensors"]]
        if len(bits) != (expected := sum(_num_bytes(size) for size in sizes)):
            raise _fault(
                bits_path,
                f"it holds {len(bits):,} bytes of bits where {JSON_FILE} lists {expected:,}",
            )
        if hashlib.sha256(bits.data).hexdigest() != record["sha256"]:
            raise _fault(bits_path, f"its bits do not have the sha256 that {JSON_FILE} records")
        tensors = {}
        offset = 0
        for entry, size in zip(record["tensors"], sizes, strict=True):
            packed = bits[offset : (offset := offset + _num_bytes(size))]
            flat = torch.from_numpy(np.unpackbits(packed, count=size).view(np.bool_))
            tensors[entry["name"]] = flat.view(entry["shape"])
            if (found := _count(flat)) != entry["num_selected"]:
                raise _fault(
                    record_path,
                    f"{entry['name']} has {found:,} entries selected, not the "
                    f"{entry['num_selected']:,} of num_selected",
                )
        try:
            mask = cls(tensors, provenance=record["provenance"])
        except ValueError as error:
            raise _fault(record_path, str(error).rstrip(".")) from error
        for key in ("num_trainable", "num_entries"):
            if (found := getattr(mask, key)) != record[key]:
                raise _fault(record_path, f"its tensors make {key} {found:,}, not {record[key]:,}")
        return mask


def _as_bool(name: str, tensor: Tensor) -> Tensor:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise ValueError(
            f"A FishMask maps parameter names to tensors, but {name!r} maps to a "
            f"{type(tensor).__name__}."
        )
    if tensor.dtype == torch.bool:
        return tensor
    wrong = _count((tensor != 0) & (tensor != 1))
    if wrong:
        raise ValueError(
            f"The mask of {name} must hold only False and True, or 0 and 1, but {wrong:,} of its "
            f"{tensor.numel():,} entries ({tensor.dtype}) are neither. To select by scores, call "
            "create_mask_from_fisher."
        )
    return tensor.detach() != 0


def _count(mask: Tensor) -> int:
    return int(torch.count_nonzero(mask))


def _num_bytes(num_bits: int) -> int:
    return -(-num_bits // 8)


def _layer(name: str) -> str:
    parts = name.removeprefix("base_model.model.").split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), 0)
    return ".".join(parts[: number + 1])


def _table(title: str, rows: Iterable[tuple[str, tuple[int, int]]]) -> list[str]:
    cells = [(title, "selected", "entries", "density")] + [
        (name, f"{selected:,}", f"{entries:,}", f"{selected / max(1, entries):.2%}")
        for name, (selected, entries) in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells
    ]


def _package_version() -> str | None:
    try:
        return version("fish-tuning")
    except PackageNotFoundError:
        return None


def _locate(
    directory: str | os.PathLike[str], filename: str, revision: str | None, token: str | bool | None
) -> Path:
    if (folder := Path(directory)).is_dir():
        if not (path := folder / filename).is_file():
            raise FileNotFoundError(
                f"{path} does not exist: {folder} holds no complete FISH mask. Name the folder "
                "that FishMask.save_pretrained wrote."
            )
        return path
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(directory), filename, revision=revision, token=token))
    # The hub's errors for a bad id are ValueErrors, those for a failed download OSErrors.
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{directory} is not a local folder, and {filename} could not be had from a hub "
            f"repository of that name ({error}). Name the folder that FishMask.save_pretrained "
            "wrote, or a repository that holds its files."
        ) from error


def _fault(path: Path, problem: str) -> ValueError:
    return ValueError(
        f"{path} cannot be used: {problem}. Fetch or copy {BITS_FILE} and {JSON_FILE} again, "
        "both from one save, or make the mask anew."
    )


def _read_bits(path: Path, content: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    try:
        # Without torch, which does not have all of the format's types.
        tensors = safetensors.deserialize(content)  # type: ignore[no-untyped-call]
        bits = dict(tensors).get("bits")
    except SafetensorError as error:
        raise _fault(path, f"it is not a whole safetensors file ({error})") from error
    if bits is None or bits["dtype"] != "U8" or len(bits["shape"]) != 1:
        raise _fault(path, 'it has no flat uint8 tensor "bits"')
    return np.frombuffer(bits["data"], np.uint8)


def _read_record(path: Path, content: bytes) -> dict[str, Any]:
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _fault(path, f"it is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise _fault(path, "it does not hold a JSON object")
    if record.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {record.get('format_version')!r}, and this version of "
            f"fish-tuning reads {FORMAT_VERSION}. Save the mask again with this version, or "
            "install the one that wrote it."
        )
    types = {
        "num_trainable": int,
        "num_entries": int,
        "sha256": str,
        "provenance": dict,
        "tensors": list,
    }
    for key, kind in types.items():
        if type(record.get(key)) is not kind:
            raise _fault(path, f'"{key}" is missing or not of JSON type {kind.__name__}')
    for position, entry in enumerate(record["tensors"]):
        if not _is_entry(entry):
            raise _fault(
                path, f'"tensors" entry {position} is not a name, a shape and a num_selected'
            )
    if len({entry["name"] for entry in record["tensors"]}) != len(record["tensors"]):
        raise _fault(path, '"tensors" lists a name twice')
    return record


def _is_entry(entry: object) -> bool:
    """Whether this is {"name": ..., "shape": ..., "num_selected": ...} of a possible tensor."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and type(entry.get("num_selected")) is int
        and isinstance(shape := entry.get("shape"), list)
        and all(type(size) is int and size >= 0 for size in shape)
        # What torch can hold: a zero elsewhere in the shape must not hide a size beyond it.
        and len(shape) <= 64
        and math.prod(max(size, 1) for size in shape) < 2**63
    )
