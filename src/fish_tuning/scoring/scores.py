"""Scores with what made them, and their file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fish_tuning import __version__
from fish_tuning.arguments import check_scores
from fish_tuning.atomic import write_atomically
from fish_tuning.distributed import world
from fish_tuning.hub import find_file
from fish_tuning.mask.files import first_problem
from fish_tuning.parts import is_divided, whole

SCORES_FILE = "fish_scores.safetensors"
FORMAT_VERSION = 1
_KEY = "fish_scores"


class _Record(BaseModel):
    model_config = ConfigDict(strict=True)

    sha256: str
    names: list[str]
    provenance: dict[Any, Any]


class FishScores(dict[str, Tensor]):
    """A score for every entry of every scored parameter, and what made the scores.

    It is a dict of tensors by parameter name, and works wherever such a dict does. Scores of a
    model that `fully_shard` has divided are DTensors, of which each process holds the rows that it
    holds of the parameter; `tensor.full_tensor()` has all rows in every process.

    Args:
        tensors: By parameter name: floating-point scores of the parameter's shape.
        provenance: How the scores were made, as values that JSON can hold.

    Raises:
        ValueError: A tensor is not floating point, or JSON cannot hold the provenance.

    Examples:
        >>> scores = score_with_perturbed_b(model, loader)
        >>> scores.save_pretrained("scores")
        >>> scores = FishScores.from_pretrained("scores")
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], *, provenance: Mapping[str, Any] | None = None
    ) -> None:
        check_scores("tensors", tensors)
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"The scores of {name} are {kind}: give floating-point tensors.")
        super().__init__(tensors)
        try:
            # Converted now, so that scores have the same provenance before and after saving.
            text = json.dumps(dict(provenance or {}), allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"The provenance of FishScores must fit in JSON: {error}.") from error
        self.provenance: dict[str, Any] = json.loads(text)

    def __repr__(self) -> str:
        entries = sum(tensor.numel() for tensor in self.values())
        return f"FishScores({entries:,} in {len(self)} tensors)"

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `fish_scores.safetensors` into a folder.

        The file holds each tensor under its parameter's name. Its metadata holds, as JSON under
        `fish_scores`, the order of the names, the provenance, the version of this library and the
        SHA-256 of the tensors' bytes.

        Scores that are divided among processes are brought together, tensor by tensor, and process
        0 writes them; all processes have to call.

        Args:
            directory: A local folder, created if it does not exist. Scores already in it are
                replaced, atomically.
        """
        writes = world()[0] == 0 or not any(map(is_divided, self.values()))
        tensors = {}
        for name, tensor in self.items():
            complete = whole(tensor.detach())
            if writes:
                tensors[name] = complete.cpu().contiguous()
        if not writes:
            return
        record = {
            "format_version": FORMAT_VERSION,
            "fish_tuning_version": __version__,
            "sha256": _digest(tensors.values()),
            "names": list(tensors),
            "provenance": self.provenance,
        }
        content = safetensors.torch.save(tensors, {_KEY: json.dumps(record)})
        write_atomically(Path(directory) / SCORES_FILE, content)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> FishScores:
        """Read scores that `save_pretrained` wrote, onto the CPU.

        Args:
            directory: A local folder or, if there is no folder of that name, a repository id on
                the Hugging Face hub.
            revision: Branch, tag or commit on the hub.
            token: Access token for the hub; True means the stored one.

        Returns:
            The scores, checked against their record.

        Raises:
            FileNotFoundError: The file is missing.
            ValueError: The file is damaged, of another kind, or has another format version.
        """
        path = find_file(
            directory,
            SCORES_FILE,
            contents="scores",
            writer="FishScores.save_pretrained",
            revision=revision,
            token=token,
        )
        return read_scores(path)


def read_scores(path: Path) -> FishScores:
    """Read and check a scores file; see `FishScores.from_pretrained`."""
    try:
        with safe_open(path, "pt") as file:
            record = _read_record(path, (file.metadata() or {}).get(_KEY))
            if sorted(file.keys()) != sorted(record.names):
                raise _unusable(path, "its record lists other tensors than it holds")
            tensors = {name: file.get_tensor(name) for name in record.names}
    except SafetensorError as error:
        raise _unusable(path, f"it is not a complete safetensors file ({error})") from error
    if _digest(tensors.values()) != record.sha256:
        raise _unusable(path, "its tensors do not have the sha256 that its record has")
    try:
        return FishScores(tensors, provenance=record.provenance)
    except ValueError as error:
        raise _unusable(path, str(error).rstrip(".")) from error


def _read_record(path: Path, text: str | None) -> _Record:
    if text is None:
        raise _unusable(path, "it is not a file that FishScores.save_pretrained wrote")
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unusable(path, f"its record is not JSON ({error})") from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version!r}, but this version of fish-tuning reads "
            f"{FORMAT_VERSION}. Save the scores again with this version, or install the version "
            "that wrote them."
        )
    try:
        return _Record.model_validate(raw)
    except ValidationError as error:
        raise _unusable(path, f"its record is wrong at {first_problem(error)}") from error


def _unusable(path: Path, problem: str) -> ValueError:
    return ValueError(
        f"{path} cannot be used: {problem}. Fetch or copy it again, or score the model again."
    )


def _digest(tensors: Iterable[Tensor]) -> str:
    sha256 = hashlib.sha256()
    for tensor in tensors:
        sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()
