"""Rows, verdicts and files; and the figures that the pages quote."""

import json
from pathlib import Path

import pytest

from benchmarks.measure import Rounds, Spread
from benchmarks.table import Results, Row, exact, timed

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


def row(median, low=None, high=None, **goal):
    spread = Spread(median, median if low is None else low, median if high is None else high)
    return Row("a step", "LoRA", "1 ms against 1 ms", spread, **goal)


@pytest.mark.parametrize(
    ("made", "verdict"),
    [
        (row(0.99, 0.9, 1.1, at_most=1), "met"),
        (row(1.01, 0.9, 1.1, at_most=1), "within spread"),
        (row(1.2, 1.1, 1.3, at_most=1), "missed"),
        (row(1.0, at_most=1), "met"),
        (row(3.5, 3, 4, at_least=3), "met"),
        (row(2.5, 2, 2.9, at_least=3), "missed"),
        (row(1.0), "-"),
    ],
)
def test_verdicts(made, verdict):
    """Guards against a missed goal that passes for one that is met."""
    assert made.verdict == made.cells()[-1] == verdict


def test_rows_of_rounds():
    """Guards the direction of a ratio."""
    rounds = Rounds({"FISH": [0.5, 0.5], "LoRA": [1.0, 2.0]})
    made = timed("a step", rounds, "FISH", "LoRA", at_most=1)
    assert (made.case, made.against) == ("a step: FISH", "LoRA")
    assert made.ratio.median == pytest.approx(0.375)
    assert made.figure == "500 ms against 1.50 s"


def test_files_and_agreement(tmp_path):
    """Guards against results that do not read back, and a second run that differs unnoticed."""
    environment = {"device": "D", "threads": 2, "versions": {"torch": "2"}}
    missed = row(1.2, 1.1, 1.3, at_most=1, rest="what it consists of")
    results = Results(environment, [missed, Row("a count", "", "3", exact(3))])
    results.save(tmp_path / "deep" / "cpu.json")
    read = Results.load(tmp_path / "deep" / "cpu.json")
    assert read == results
    text = (tmp_path / "deep" / "cpu.md").read_text(encoding="utf-8")
    assert "# Results on D" in text and "what it consists of" in text
    assert results.agreement(read) == []
    assert Results(environment, [row(1.35, 1.3, 1.5, at_most=1)]).agreement(read) == []
    later = Results(environment, [row(1.4, 1.3, 1.5, at_most=1)])
    (apart,) = later.agreement(read)
    assert "1.400 now, 1.100 to 1.300 before" in apart


def test_exact_figures_have_no_spread():
    """Guards against brackets around a count."""
    assert Row("a", "", "3", exact(3), unit=" MB").cells()[3] == "3.000 MB"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_published_results(path):
    """Guards against a table that was edited by hand, and a missed goal without its reason."""
    results = Results.load(path)
    assert path.with_suffix(".md").read_text(encoding="utf-8") == results.markdown()
    assert all(row.rest for row in results.rows if row.verdict in ("missed", "within spread"))
    assert json.loads(path.read_text(encoding="utf-8"))["environment"]["device"]


@pytest.mark.parametrize(
    ("section", "results"), [("The most important figures", "cpu"), ("On an accelerator", "cuda")]
)
def test_the_page_quotes_the_results(section, results):
    """Guards against figures in the documentation that no file of results holds."""
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    text = page.partition(f"## {section}\n")[2].partition("\n## ")[0]
    quoted = [line for line in text.splitlines() if line.startswith("| ")]
    published = (ROOT / "benchmarks" / "results" / f"{results}.md").read_text(encoding="utf-8")
    assert len(quoted) > 5
    assert [line for line in quoted if line not in published.splitlines()] == []
