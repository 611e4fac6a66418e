"""fish-tuning pack and unpack."""

import re
import sys
from pathlib import Path

import pytest

from fish_tuning import FishMask
from fish_tuning.cli.pack import _MARK
from fish_tuning.packing.packed_file import FORMAT
from tests.cli.running import invoke, listing
from tests.models import tiny_bert
from tests.packing.saved_folders import contents, fine_tuned, load_base, new_adapter, trained


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base model, an adapter trained on it and the model itself trained, side by side."""
    tiny_bert(num_hidden_layers=3).save_pretrained(tmp_path / "base")
    trained(new_adapter(load_base(tmp_path / "base")), tmp_path / "adapter")
    fine_tuned(tmp_path / "base", tmp_path / "model")
    return tmp_path


def rows(stdout: str) -> dict[str, list[str]]:
    """The table: first cell to the others."""
    lines = [re.split(r" {2,}", line.strip()) for line in stdout.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) > 1}


def test_adapter(folder):
    """Guards the way there and back, and the sizes that are shown."""
    file = folder / "packed.safetensors"
    result = invoke("pack", folder / "adapter", file, "--seed", "3")
    assert result.exit_code == 0, result.output
    assert result.stderr == "note: not packed: training_args.bin\n"
    weights = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    size = file.stat().st_size
    assert result.stdout.splitlines()[-1] == (
        f"{file}: {size:,} bytes, {size / weights:.1%} of the {weights:,} of the weights file"
    )
    table = rows(result.stdout)
    selected = FishMask.from_pretrained(folder / "adapter").num_trainable
    assert table["selected"] == [f"{selected:,}", f"{4 * selected:,}"]
    assert table["mask, names, configs"] == [f"{size - 4 * selected:,}"]
    assert table["frozen, drawn from the seed"][1] == table["frozen, one constant"][1] == "0"
    assert "frozen, stored" not in table

    result = invoke("unpack", file, folder / "again")
    assert result.exit_code == 0, result.output
    total = sum(map(len, contents(folder / "again").values()))
    assert result.stdout.endswith(f"again: {total:,} bytes from {size:,}\n")
    assert contents(folder / "again").items() <= contents(folder / "adapter").items()


def test_base_model_named(folder):
    """Guards adapters whose base model lies elsewhere on the machine that unpacks."""
    invoke("pack", folder / "adapter", folder / "packed", "--seed", "3")
    (folder / "base").rename(folder / "elsewhere")
    before = listing(folder)
    result = invoke("unpack", folder / "packed", folder / "again")
    assert result.exit_code == 2
    assert "cannot be loaded" in result.stderr and "--base" in result.stderr
    assert listing(folder) == before
    result = invoke("unpack", folder / "packed", folder / "again", "--base", folder / "elsewhere")
    assert result.exit_code == 0, result.output
    (folder / "packed").unlink()
    arguments = ["pack", folder / "adapter", folder / "packed", "--seed", "3"]
    assert invoke(*arguments).exit_code == 2
    assert invoke(*arguments, "--base", folder / "elsewhere").exit_code == 0


def test_model(folder):
    """Guards --start, both ways."""
    result = invoke("pack", folder / "model", folder / "packed", "--start", folder / "base")
    assert result.exit_code == 0, result.output
    assert "frozen, as in the start" in rows(result.stdout)
    result = invoke("unpack", folder / "packed", folder / "again")
    assert result.exit_code == 2 and "--start" in result.stderr
    result = invoke("unpack", folder / "packed", folder / "again", "--start", folder / "base")
    assert result.exit_code == 0, result.output
    assert contents(folder / "again").items() <= contents(folder / "model").items()


def test_what_is_stored_whole_is_said(folder):
    """Guards against a file that is larger than it need be, without a word."""
    result = invoke("pack", folder / "adapter", folder / "packed")
    assert result.exit_code == 0, result.output
    [count, size] = rows(result.stdout)["frozen, stored"]
    assert f"note: {count} frozen entries ({size} bytes) of 6 tensors are stored" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pack", "none", "packed"], "none is not a folder"),
        (["pack", "base", "packed"], "base holds no complete FISH mask"),
        (["pack", "adapter", "model"], "model exists: name a new file"),
        (["pack", "adapter", "packed", "--start", "none"], "none holds no safetensors file"),
        (["unpack", "none", "again"], "none does not exist"),
        (["unpack", "base/config.json", "again"], "config.json cannot be used"),
        (["unpack", "base/model.safetensors", "again"], "not a file that fish-tuning pack wrote"),
    ],
)
def test_mistakes(folder, monkeypatch, arguments, message):
    """Guards mistakes against tracebacks, and folders against leftovers."""
    monkeypatch.chdir(folder)
    before = listing(folder)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert result.stdout == ""
    assert listing(folder) == before


def test_a_file_of_another_kind_is_refused_at_once(tmp_path, monkeypatch):
    """Guards the check before the slow imports, by the mark that packed files have."""
    assert FORMAT.encode() == _MARK
    monkeypatch.setitem(sys.modules, "fish_tuning.packing", None)
    for content in (b"", b"garbage" * 99, b"\xff" * 50):
        (tmp_path / "file").write_bytes(content)
        result = invoke("unpack", tmp_path / "file", tmp_path / "folder")
        assert result.exit_code == 2
        assert "is not a file that fish-tuning pack wrote" in result.stderr
