"""The mask: which entries of which parameters are trained."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fish_tuning.arguments import check_mask
from fish_tuning.hub import find_file
from fish_tuning.mask.files import (
    BITS_FILE,
    JSON_FILE,
    check_weights,
    count,
    read_mask,
    unusable,
    write_mask,
)
from fish_tuning.names import layer_path


class FishMask(Mapping[str, Tensor]):
    """Boolean tensors by parameter name: True entries are trained, False entries stay frozen.

    Every scored tensor is present, in the given order; a tensor that is trained densely is all
    True. Tensors keep their device. Boolean tensors are kept as they are, not copied.

    Args:
        tensors: By parameter name: a boolean tensor of the parameter's shape, or a tensor of
            zeros and ones of any dtype.
        provenance: How the mask was made, as values that JSON can hold.

    Raises:
        ValueError: There is no tensor, a tensor holds values other than 0 and 1, or JSON cannot
            hold the provenance.

    Examples:
        >>> mask = FishMask({"layer.weight": torch.tensor([[0, 1], [1, 0]])})
        >>> mask.num_trainable
        2
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], *, provenance: Mapping[str, Any] | None = None
    ) -> None:
        check_mask("tensors", tensors)
        if not tensors:
            raise ValueError("A FishMask needs at least one tensor, but the mapping is empty.")
        self._tensors = {name: _as_bool(name, tensor) for name, tensor in tensors.items()}
        try:
            # Converted now, so that a mask has the same provenance before and after saving.
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
        """Compare names, shapes and bits, but not order, devices or provenance."""
        if not isinstance(other, FishMask):
            return NotImplemented
        return self.keys() == other.keys() and all(
            torch.equal(tensor, other[name].to(tensor.device)) for name, tensor in self.items()
        )

    def __repr__(self) -> str:
        return f"FishMask({self.num_trainable:,} of {self.num_entries:,} in {len(self)} tensors)"

    @property
    def num_trainable(self) -> int:
        """Number of True entries, including those of densely trained tensors."""
        return sum(count(tensor) for tensor in self.values())

    @property
    def num_entries(self) -> int:
        """Number of entries in all tensors."""
        return sum(tensor.numel() for tensor in self.values())

    @property
    def density(self) -> float:
        """Fraction of all entries that are True."""
        return self.num_trainable / max(1, self.num_entries)

    def summary(self) -> str:
        """Format the counts: total, per layer (the path up to its first number) and per tensor."""
        # The last component is never part of the prefix: a single tensor would lose its name.
        columns = zip(*(name.split(".")[:-1] for name in self), strict=False)
        prefix = "".join(f"{c[0]}." for c in takewhile(lambda c: len(set(c)) == 1, columns))
        counts = [(count(tensor), tensor.numel()) for tensor in self.values()]
        layers: dict[str, tuple[int, int]] = {}
        for name, (selected, entries) in zip(self, counts, strict=True):
            before = layers.get(layer := layer_path(name), (0, 0))
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

    def save_pretrained(
        self, directory: str | os.PathLike[str], *, weights: Iterable[Path] = ()
    ) -> None:
        """Write `fish_mask.safetensors` and `fish_mask.json` into a folder.

        The first file holds one uint8 tensor, "bits": the bits of every tensor, flattened, in the
        mask's order, the first entry in the highest bit (`numpy.packbits`), each tensor padded to
        a full byte. The second file holds names, shapes, counts, the provenance, and the SHA-256 of
        the bits and of the weights.

        Args:
            directory: A local folder, created if it does not exist. Mask files already in it are
                replaced, each of them atomically.
            weights: Files in the folder that hold the weights trained with this mask. If others
                take their place, `from_pretrained` refuses the mask.
        """
        write_mask(Path(directory), self, self.provenance, weights)

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
            directory: A local folder or, if there is no folder of that name, a repository id on
                the Hugging Face hub.
            revision: Branch, tag or commit on the hub.
            token: Access token for the hub; True means the stored one.

        Returns:
            The mask, checked against its own record.

        Raises:
            FileNotFoundError: One of the two files is missing.
            ValueError: A file is damaged, has another format version, or does not match the
                other file; or other weights lie beside them than when the mask was saved.
        """
        record_path, bits_path = (
            find_file(
                directory,
                name,
                contents="FISH mask",
                writer="FishMask.save_pretrained",
                revision=revision,
                token=token,
            )
            for name in (JSON_FILE, BITS_FILE)
        )
        record = record_path.read_bytes()
        mask = cls.from_bytes(record, bits_path.read_bytes(), record_path, bits_path)
        check_weights(record_path, record)
        return mask

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
            record_content: Content of `fish_mask.json`.
            bits_content: Content of `fish_mask.safetensors`.
            record_path: What error messages call the first file.
            bits_path: What error messages call the second file.

        Returns:
            The mask, checked against its own record.

        Raises:
            ValueError: A file is damaged, has another format version, or does not match the
                other file.
        """
        tensors, provenance = read_mask(record_content, bits_content, record_path, bits_path)
        try:
            return cls(tensors, provenance=provenance)
        except ValueError as error:
            raise unusable(record_path, str(error).rstrip(".")) from error


def _as_bool(name: str, tensor: Tensor) -> Tensor:
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise ValueError(
            f"A FishMask maps parameter names to tensors, but {name!r} maps to a "
            f"{type(tensor).__name__}."
        )
    if tensor.dtype == torch.bool:
        return tensor
    wrong = count((tensor != 0) & (tensor != 1))
    if wrong:
        raise ValueError(
            f"The mask of {name} must hold only False and True, or 0 and 1, but {wrong:,} of its "
            f"{tensor.numel():,} entries ({tensor.dtype}) are neither. To select by scores, call "
            "create_mask_from_fisher."
        )
    return tensor.detach() != 0


def _table(title: str, rows: Iterable[tuple[str, tuple[int, int]]]) -> list[str]:
    cells = [(title, "selected", "entries", "density")] + [
        (name, f"{selected:,}", f"{entries:,}", f"{selected / max(1, entries):.2%}")
        for name, (selected, entries) in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells
    ]
