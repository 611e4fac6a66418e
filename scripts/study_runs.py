"""The runs of a study as CSV files, and what its pages make of them."""

import argparse
import csv
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from fish_tuning.experiments.report.arm_runs import ArmRuns
from fish_tuning.experiments.report.results_csv import csv_table
from fish_tuning.experiments.report.statistics import Difference, paired_difference
from fish_tuning.experiments.results import Results, Run, read_results
from fish_tuning.experiments.tables import Table

STUDY = Path(__file__).parents[1] / "docs" / "study"


def rebuild(page: Path, tables: Callable[[], Mapping[str, Table]]) -> None:
    """Take the sweeps named on the command line into the runs beside a page, and fill the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--take", type=Path, nargs="*", default=[], help="folders of sweeps")
    for sweep in parser.parse_args().take:
        results = read_results(sweep)
        file = page.parent / "runs" / f"{results.name}.csv"
        file.write_text(csv_table([results]), encoding="utf-8")
    page.write_text(filled(page.read_text(encoding="utf-8"), tables()), encoding="utf-8")


@cache
def read_runs(*files: Path) -> Results:
    """Read the runs of some of these files as those of one sweep, named after the first."""
    runs: list[Run] = []
    for file in files:
        with file.open(encoding="utf-8", newline="") as stream:
            runs += map(_run, csv.DictReader(stream))
    return Results(
        name=files[0].stem,
        config={},
        runs=[run for run in runs if run.held_out is None],
        search=[run for run in runs if run.held_out is not None],
    )


def _run(row: Mapping[str, str]) -> Run:
    known = {name: row[name] for name in row.keys() & Run.model_fields.keys() if row[name]}
    measured: dict[str, dict[str, float]] = {"metrics": {}, "metrics_before": {}}
    for column, value in row.items():
        kind, _, name = column.partition(".")
        if name and value:
            measured[kind][name] = float(value)
    return Run.model_validate({"ratio": None, **known, "config": {}, **measured})


def filled(text: str, tables: Mapping[str, Table]) -> str:
    """Return a page with the table between each pair of markers rebuilt."""

    def replace(match: re.Match[str]) -> str:
        table = tables[match[1]].markdown(escape=str)
        return f"<!-- table: {match[1]} -->\n\n{table}\n\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w, ]+?) -->\n.*?<!-- end -->", replace, text, flags=re.DOTALL)


def difference_of(
    groups: Mapping[str, ArmRuns], arm: str, baseline: str, metric: str = ""
) -> Difference | None:
    """Return the difference of two arms, paired by seed; None without one of them."""
    if arm not in groups or baseline not in groups:
        return None
    return paired_difference(values(groups[arm], metric), values(groups[baseline], metric))


def values(group: ArmRuns, metric: str = "") -> dict[int, float]:
    """Return a metric by seed; by default the main one."""
    return group.by_seed(metric or group.runs[0].main_metric or "")


def interval(difference: Difference, style: str = "{:+.2f}", unit: float = 100) -> str:
    """Write a difference with its interval; by default in points (hundredths)."""
    mean, *bounds = (
        style.format(unit * value) for value in (difference.mean, *(difference.interval or ()))
    )
    return f"{mean} [{', '.join(bounds)}]" if bounds else mean
