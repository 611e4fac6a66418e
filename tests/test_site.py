"""The docs site: built as `make docs` builds it, with an entry for every public name."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fish_tuning

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"
PACKAGES = ["from_trainer", "mask", "packing", "scoring", "selection", "sparse"]

ENTRIES = {
    name
    for page in REFERENCE.glob("*.md")
    for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
}


def resolved(name):
    """The object that an entry is about."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("package", ["", *PACKAGES])
def test_every_public_name_has_an_entry(package):
    """Guards a name that is public and that nobody finds in the API reference."""
    module = importlib.import_module(f"fish_tuning.{package}".rstrip("."))
    documented = [resolved(name) for name in ENTRIES]
    missing = [
        name
        for name in module.__all__
        if not any(getattr(module, name) is entry for entry in documented)
    ]
    assert not missing


def test_the_overview_lists_every_public_name():
    """Guards the table of the reference against names that it lacks, or that have moved."""
    overview = (REFERENCE / "README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| \[`(\w+)`\]\((\S+)\) \|", overview, re.MULTILINE))
    assert sorted(listed) == sorted(fish_tuning.__all__)
    for name, page in listed.items():
        assert f"::: fish_tuning.{name}\n" in (REFERENCE / page).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    program = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(
        program,
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return folder


def test_the_site_has_every_entry(site):
    """Guards entries that the site leaves out, pages that nothing leads to, and broken links."""
    pages = "".join(
        page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html")
    )
    assert [name for name in ENTRIES if f'id="{name}"' not in pages] == []


def test_the_site_has_every_command(site):
    """Guards a page of the command line that is empty, or of another version of it."""
    page = (site / "reference" / "command-line.html").read_text(encoding="utf-8")
    for command in ("run", "plan", "inspect", "report", "pack", "unpack", "env"):
        assert f"fish-tuning {command}" in page


def test_the_site_fetches_nothing(site):
    """Guards fonts, styles and scripts that readers would load from elsewhere."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert re.findall(r"<(?:script|img|iframe)[^>]*src=\"?https?:[^>]*>", text) == []
        assert re.findall(r"<link[^>]*href=\"?https?:[^>]*>", text) == []


def test_links_out_of_docs_lead_to_pages(site):
    """Guards links to files outside of docs/, which the site has as pages of its own."""
    page = (site / "benchmarks.html").read_text(encoding="utf-8")
    assert 'href="benchmarks/results/cpu.html"' in page
    assert (site / "benchmarks" / "results" / "cpu.html").is_file()
    home = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="guide.html"' in home
