"""Grouping of runs by arm and budget."""

import math

from fish_tuning.experiments.report.arm_runs import baseline_of, group_runs
from tests.experiments.sweep_sample import failed_run, make_run, make_sweep


def test_groups_by_arm_and_budget():
    """Guards against runs of two budgets in one mean, and labels that do not tell them apart."""
    groups = group_runs(make_sweep(seeds=(1, 2), ratios=(1.0, 0.25)).runs)
    assert [group.label for group in groups] == [
        "Original LoRA",
        "LoRA-FISH (100%)",
        "LoRA-FISH-rand (100%)",
        "LoRA-FISH-rev (100%)",
        "LoRA-FISH (25%)",
        "LoRA-FISH-rand (25%)",
        "LoRA-FISH-rev (25%)",
    ]
    assert all([run.seed for run in group.runs] == [1, 2] for group in groups)
    assert group_runs(make_sweep().runs)[1].label == "LoRA-FISH"


def test_values_by_seed_leave_out_failed_and_missing():
    """Guards against a failed run, a metric that is not there and nan in a mean."""
    runs = [
        make_run("LoRA-FISH", 1, metrics={"accuracy": 0.5}),
        make_run("LoRA-FISH", 2, metrics={}),
        make_run("LoRA-FISH", 3, metrics={"accuracy": math.nan}),
        failed_run("LoRA-FISH", 4, metrics={"accuracy": 0.9}),
    ]
    (group,) = group_runs(runs)
    assert group.by_seed("accuracy") == {1: 0.5}


def test_baseline_of_the_same_budget_first():
    """Guards against a masked arm at a quarter compared with the wrong one of two baselines."""
    both = [make_run("Original LoRA", 1, ratio) for ratio in (1.0, 0.25)]
    groups = group_runs([*both, make_run("LoRA-FISH", 1, 0.25), make_run("LoRA-FISH", 1, 0.5)])
    assert baseline_of(groups[2], groups, "Original LoRA") is groups[1]
    assert baseline_of(groups[3], groups, "Original LoRA") is groups[0]
    assert baseline_of(groups[3], groups[2:], "Original LoRA") is None
