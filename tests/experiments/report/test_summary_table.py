"""The tables of reports: the numbers in them."""

import re

import numpy as np

from fish_tuning.experiments.report.comparison import compare
from fish_tuning.experiments.report.summary_table import comparison_table
from fish_tuning.experiments.report.write import write_report
from fish_tuning.experiments.results import Results
from tests.experiments.sweep_sample import failed_run, make_run, make_sweep


def rows_of(sweep):
    table = comparison_table(compare(sweep))
    return [dict(zip(table.headers, row, strict=True)) for row in table.rows]


def test_table_has_means_deviations_and_differences():
    """Guards the numbers that people quote, against numpy."""
    sweep = make_sweep()
    values = {
        arm: np.array([run.metrics["accuracy"] for run in sweep.runs if run.arm == arm])
        for arm in ("Original LoRA", "LoRA-FISH")
    }
    seconds = [run.train_seconds for run in sweep.runs if run.arm == "LoRA-FISH"]
    baseline, fish = rows_of(sweep)[:2]
    own = values["LoRA-FISH"]
    assert fish["Method"] == "LoRA-FISH"
    assert fish["Val Accuracy"] == f"{own.mean():.4f} ± {own.std(ddof=1):.4f}"
    assert fish["Train Time (s)"] == f"{np.mean(seconds):.1f} ± {np.std(seconds, ddof=1):.1f}"
    assert fish["Peak Memory (MiB)"] == "702 ± 1"
    assert fish["Final Trainable Params"] == "28,418"
    assert fish["Seeds"] == "3"
    difference = fish["Difference to Original LoRA"]
    assert difference.startswith(f"{(own - values['Original LoRA']).mean():+.4f} [")
    assert baseline["Difference to Original LoRA"] == "baseline"


def test_one_seed_has_no_spread():
    """Guards against nan, and an interval that one seed cannot give."""
    fish = rows_of(make_sweep(seeds=(5,)))[1]
    assert re.fullmatch(r"0\.\d{4}", fish["Val Accuracy"])
    assert fish["Difference to Original LoRA"].endswith("(1 seed: no interval)")


def test_failed_runs_leave_the_numbers_and_are_listed(tmp_path):
    """Guards against a failure that is counted as a result, and one that nobody sees."""
    sweep = make_sweep()
    failed = sweep.model_copy(update={"runs": [*sweep.runs, failed_run(ratio=1.0)]})
    before, after = rows_of(sweep)[1], rows_of(failed)[1]
    assert after.pop("Seeds") == "3 (1 failed)"
    assert after.items() <= before.items()
    for path in write_report(failed, tmp_path):
        assert "ValueError: training diverged" in path.read_text(encoding="utf-8")


def test_trainable_counts_that_differ_are_not_hidden():
    """Guards against a count shown as one number where seeds trained different numbers."""
    runs = [make_run("LoRA-FISH", seed, trainable_params=100 + 2 * seed) for seed in (1, 3)]
    row = rows_of(Results(name="x", config={}, runs=runs))[0]
    assert row["Final Trainable Params"] == "104 ± 3"
