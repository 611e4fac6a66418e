"""Figures of a sweep: what they show, read back from their traces."""

import json
import math
from collections import defaultdict

import numpy as np
import pytest

from fish_tuning.experiments.report.arm_runs import group_runs
from fish_tuning.experiments.report.figures.sweep import (
    metric_by_arm,
    pareto_front,
    score_distribution,
    trade_off,
    training_loss,
    validation_curve,
)
from fish_tuning.experiments.results import ScoreHistogram
from tests.experiments.sweep_sample import failed_run, make_run, make_sweep

COLORS = defaultdict(lambda: "#3b7dd8")


def groups_of(**changes):
    return group_runs(make_sweep(**changes).runs)


def points(trace):
    return [float(x) for x in trace.x], [float(y) for y in trace.y]


def test_metric_by_arm_has_every_dot_and_the_mean():
    """Guards against a seed that is not drawn, and a line that is not at the mean."""
    groups = groups_of()
    figure = metric_by_arm(groups, "accuracy", COLORS)
    for group, dots, mean in zip(groups, figure.data[::2], figure.data[1::2], strict=True):
        values = [run.metrics["accuracy"] for run in group.runs]
        assert list(dots.x) == values
        assert len(set(dots.y)) == 3
        assert list(mean.x) == pytest.approx([np.mean(values)] * 2)
        assert dots.meta == mean.meta == group.arm
    assert list(figure.layout.yaxis.ticktext) == [group.arm for group in groups]


def test_curves_have_a_line_a_seed_and_their_mean():
    """Guards against curves averaged over unlike steps, a seed that is missing, and failed ones."""
    runs = [
        make_run("LoRA-FISH", 1, train_curve=[{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]),
        make_run(
            "LoRA-FISH",
            2,
            train_curve=[
                {"step": 1, "loss": 2.0},
                {"step": 2, "loss": math.nan},
                {"step": 3, "loss": 9.0},
            ],
        ),
        failed_run("LoRA-FISH", 3, train_curve=[{"step": 1, "loss": 50.0}]),
    ]
    first, second, mean = map(points, training_loss(group_runs(runs), COLORS).data)
    assert first == ([1, 2], [1.0, 0.5])
    assert second == ([1, 3], [2.0, 9.0])
    # Only step 1 is in both.
    assert mean == ([1], [1.5])


def test_long_curves_are_averaged_down():
    """Guards against reports of many megabytes, and a curve thinned by dropping its end."""
    curve = [{"step": step, "loss": float(step % 2)} for step in range(1, 10_001)]
    groups = group_runs([make_run("LoRA-FISH", 1, train_curve=curve)])
    (line,) = training_loss(groups, COLORS).data
    assert len(line.x) == 200
    assert list(line.y) == [0.5] * 200
    assert line.x[-1] > 9_900


def test_pareto_front_by_hand():
    """Guards against arms on the front that another one beats with as few parameters."""
    points = [(10, 0.5), (10, 0.6), (20, 0.6), (30, 0.9), (40, 0.8)]
    assert pareto_front(points, "accuracy") == [(10, 0.6), (30, 0.9)]
    assert pareto_front(points, "eval_loss") == [(10, 0.5)]
    groups = groups_of(ratios=(0.1, 1.0))
    front = next(t for t in trade_off(groups, "accuracy", COLORS).data if t.name == "Pareto front")
    assert list(front.x) == [2_842, 28_418]


def test_trade_off_only_with_several_counts():
    """Guards against a figure without a trade-off, and counts in the wrong place."""
    assert trade_off(groups_of(), "accuracy", COLORS) is None
    groups = groups_of(ratios=(0.1, 1.0))
    line = next(t for t in trade_off(groups, "accuracy", COLORS).data if t.meta == "LoRA-FISH")
    assert list(line.x) == [2_842, 28_418]
    values = {
        group.ratio: np.mean(list(group.by_seed("accuracy").values()))
        for group in groups
        if group.arm == "LoRA-FISH"
    }
    assert list(line.y) == pytest.approx([values[0.1], values[1.0]])


def test_score_distribution_names_zeros_and_takes_empty_bins():
    """Guards against hidden zeros, and a crash where all scores of a kind are 0."""
    histograms = [
        ScoreHistogram(kind="lora_A", zeros=30, log10_edges=[], counts=[]),
        ScoreHistogram(kind="lora_B", zeros=1, log10_edges=[-3.0, -2.0, -1.0], counts=[5, 2]),
    ]
    (group,) = group_runs([make_run("LoRA-FISH", 1, score_histograms=histograms)])
    names = [trace.name for trace in score_distribution(group).data]
    assert names == ["lora_A: 100.0% are exactly 0", "lora_B: 12.5% are exactly 0"]


def test_no_figure_without_data():
    """Guards against empty frames in the report, and crashes on runs that recorded nothing."""
    groups = group_runs([failed_run()])
    assert metric_by_arm(groups, "accuracy", COLORS) is None
    assert training_loss(groups, COLORS) is None
    assert validation_curve(groups, "accuracy", COLORS) is None
    assert trade_off(groups, "accuracy", COLORS) is None
    assert score_distribution(groups[0]) is None


def test_names_are_text():
    """Guards against markup, templates and formulas in names, which plotly would carry out."""
    name = "<a href='http://x'>%{x}$y$</a>"
    groups = group_runs([make_run(name, seed) for seed in (1, 2)])
    for figure in (metric_by_arm(groups, "accuracy", COLORS), training_loss(groups, COLORS)):
        shown = json.dumps([trace.to_plotly_json() for trace in figure.data], default=list)
        shown = shown.replace(json.dumps(name), "")  # an arm's own name, in `meta`
        assert "<a" not in shown and "%{x}" not in shown and "$" not in shown
        assert "%&#123;x}" in shown
