"""Every case runs, on models so small that it takes seconds."""

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import CASES, app
from benchmarks.setting import Setting
from benchmarks.shapes import TINYLLAMA
from benchmarks.table import Results

SLOW = {"compiling", "step_with_default_malloc"}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES]
)
def test_cases_run(case):
    """Guards against a case that only fails after ten minutes, or on an accelerator."""
    rows = list(CASES[case](Setting(tiny=True)))
    assert rows
    for row in rows:
        assert row.ratio.low <= row.ratio.median <= row.ratio.high
        assert row.rest or row.at_most is None or row.ratio.low == row.ratio.high


@pytest.mark.parametrize("case", ["time_of_scoring", "time_of_a_step", "top_k"])
def test_cases_run_as_on_an_accelerator(case, monkeypatch):
    """Guards what only an accelerator's run reaches: its sizes, rounds and goals."""
    monkeypatch.setattr(Setting, "on_cpu", False)
    assert list(CASES[case](Setting(tiny=True)))
    assert TINYLLAMA in Setting().shapes


def test_what_a_mask_keeps_is_found():
    """Guards a measure that looks in the wrong place, finds nothing and meets its goal."""
    rows = list(CASES["optimizer_state"](Setting(tiny=True)))
    assert [row.case for row in rows if row.ratio.median <= 0] == []


def test_part_of_the_suite(tmp_path):
    """Guards the command: its files, and what a second run says of the first."""
    output = str(tmp_path / "part.json")
    command = ["--tiny", "--only", "application", "--output", output]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    assert len(Results.load(tmp_path / "part.json").rows) == 1
    second = CliRunner().invoke(app, command)
    assert "of 1 figures" in second.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing"], "choose from time_of_scoring"),
        (["--tiny"], "give it an --output"),
        (["--only", "top_k"], "give it an --output"),
    ],
)
def test_wrong_arguments(arguments, message):
    """Guards against a part of the suite that overwrites the published results."""
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert message in result.output
