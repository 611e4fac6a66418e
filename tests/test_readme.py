"""The README is run, block by block."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fish_tuning.cli import main
from fish_tuning.experiments.config.load import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_every_block_has_a_test():
    """Guards a block in a language that none of the tests below runs."""
    languages = re.findall(r"^```(\w*)\n.*?^```$", README, re.MULTILINE | re.DOTALL)
    assert set(languages) == {"python", "console", "yaml", "text"}


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    """Guards examples that do not run as they are printed."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert (tmp_path / "adapter" / "fish_mask.safetensors").is_file()
    assert namespace["mask"].num_trainable == 56_000
    assert namespace["get_mask"](namespace["model"]) == namespace["mask"]


@pytest.mark.parametrize("block", blocks("yaml"))
def test_experiments_load(block, tmp_path):
    """Guards a YAML that is said to be complete as it stands."""
    (tmp_path / "experiment.yaml").write_text(block, encoding="utf-8")
    config = load_config(tmp_path / "experiment.yaml")
    assert (config.lora.baseline_rank, config.fish_tuning.ratios) == (8, [0.5])


@pytest.mark.parametrize(
    "command", [line[2:] for block in blocks("console") for line in block.splitlines()]
)
def test_commands_exist(command):
    """Guards commands, options and files that the project does not have."""
    program, *arguments = shlex.split(command)
    if program == "make":
        subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif program == "pip":
        assert command == "pip install 'fish-tuning[experiments]'"
        assert "\nexperiments = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    else:
        assert program == "fish-tuning"
        help_text = CliRunner().invoke(main, [arguments[0], "--help"])
        assert help_text.exit_code == 0
        assert all(option in help_text.output for option in arguments if option.startswith("--"))
        files = [ROOT / argument for argument in arguments if argument.endswith(".yaml")]
        assert all(file.is_file() for file in files)
        if "--set" in arguments:
            load_config(files[0], [arguments[-1]])
