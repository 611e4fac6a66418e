"""The README is run, block by block."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_every_block_has_a_test():
    """Guards a block in a language that none of the tests below runs."""
    languages = re.findall(r"^```(\w*)\n.*?^```$", README, re.MULTILINE | re.DOTALL)
    assert set(languages) == {"python", "console"}


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    """Guards examples that do not run as they are printed."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert (tmp_path / "adapter" / "fish_mask.safetensors").is_file()
    assert namespace["mask"].num_trainable == 56_000
    assert namespace["get_mask"](namespace["model"]) == namespace["mask"]


@pytest.mark.parametrize(
    "command", [line[2:] for block in blocks("console") for line in block.splitlines()]
)
def test_commands_exist(command):
    """Guards commands that the project does not have."""
    program, *arguments = command.split()
    if program == "make":
        subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
    else:
        assert command == "pip install fish-tuning"
        assert 'name = "fish-tuning"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
