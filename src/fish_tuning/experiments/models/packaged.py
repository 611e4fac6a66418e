"""Models whose weights come in a Python package, found without importing it and checked."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from pathlib import Path


def packaged_weights(
    package: str, file: str, sha256: str, *, model: str, install: str, reinstall: str
) -> Path:
    """Return the weights file inside an installed package.

    It is compared with the SHA-256 of the published file, so that results obtained with it can be
    compared with other people's.

    Args:
        package: Import name of the package.
        file: Path of the weights in it.
        sha256: The published hash.
        model: The model's name, for messages.
        install: The command that installs the package.
        reinstall: The command that restores it.

    Raises:
        ModuleNotFoundError: The package is not installed.
        ValueError: The weights are missing or are not the published ones.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"The packaged {model} is not installed; run: {install}", name=package
        )
    weights = Path(spec.submodule_search_locations[0]) / file
    if not weights.is_file():
        raise ValueError(f"{weights} is missing; run: {reinstall}")
    digest = file_sha256(weights)
    if digest != sha256:
        raise ValueError(
            f"{weights} has SHA-256 {digest}, the published {model} has {sha256}; run: {reinstall}"
        )
    return weights


def file_sha256(file: Path) -> str:
    """Hash a file once per process, and again only if it was modified."""
    return _sha256(file, file.stat().st_mtime_ns)


@functools.cache
def _sha256(file: Path, modified: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
