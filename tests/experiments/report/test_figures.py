"""Figures of a sweep: what they show, read back from matplotlib."""

import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from fish_tuning.experiments.report.arm_runs import group_runs
from fish_tuning.experiments.report.density_figure import density_figure
from fish_tuning.experiments.report.figures import (
    metric_by_arm,
    score_distribution,
    trade_off,
    training_loss,
    validation_curve,
)
from fish_tuning.experiments.report.svg import to_svg
from fish_tuning.experiments.results import ScoreHistogram
from tests.experiments.sweep_sample import failed_run, make_run, make_sweep


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter() if element.text]


def groups_of(**changes):
    return group_runs(make_sweep(**changes).runs)


def test_metric_by_arm_has_every_dot_and_the_mean():
    """Guards against a seed that is not drawn, and a line that is not at the mean."""
    groups = groups_of()
    (axes,) = metric_by_arm(groups, "accuracy").axes
    lines = axes.get_lines()
    for group, dots, mean in zip(groups, lines[::2], lines[1::2], strict=True):
        values = [run.metrics["accuracy"] for run in group.runs]
        assert list(dots.get_xdata()) == values
        assert len(set(dots.get_ydata())) == 3
        assert mean.get_xdata() == pytest.approx([np.mean(values)] * 2)
    assert [label.get_text() for label in axes.get_yticklabels()] == [g.arm for g in groups]


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
    (axes,) = training_loss(group_runs(runs)).axes
    first, second, mean = [
        (list(map(float, line.get_xdata())), list(map(float, line.get_ydata())))
        for line in axes.get_lines()
    ]
    assert first == ([1, 2], [1.0, 0.5])
    assert second == ([1, 3], [2.0, 9.0])
    # Only step 1 is in both.
    assert mean == ([1], [1.5])


def test_long_curves_are_averaged_down():
    """Guards against reports of many megabytes, and a curve thinned by dropping its end."""
    curve = [{"step": step, "loss": float(step % 2)} for step in range(1, 10_001)]
    (axes,) = training_loss(group_runs([make_run("LoRA-FISH", 1, train_curve=curve)])).axes
    (line,) = axes.get_lines()
    assert len(line.get_xdata()) == 200
    assert list(line.get_ydata()) == [0.5] * 200
    assert line.get_xdata()[-1] > 9_900


def test_trade_off_only_with_several_budgets():
    """Guards against a figure of one point per arm, and counts in the wrong place."""
    assert trade_off(groups_of(), "accuracy") is None
    groups = groups_of(ratios=(0.1, 1.0))
    (axes,) = trade_off(groups, "accuracy").axes
    line = next(line for line in axes.get_lines() if line.get_label() == "LoRA-FISH")
    assert list(line.get_xdata()) == [2_842, 28_418]
    values = {
        group.ratio: np.mean(list(group.by_seed("accuracy").values()))
        for group in groups
        if group.arm == "LoRA-FISH"
    }
    assert line.get_ydata() == pytest.approx([values[0.1], values[1.0]])


def test_score_distribution_names_zeros_and_takes_empty_bins():
    """Guards against hidden zeros, and a crash where all scores of a kind are 0."""
    histograms = [
        ScoreHistogram(kind="lora_A", zeros=30, log10_edges=[], counts=[]),
        ScoreHistogram(kind="lora_B", zeros=1, log10_edges=[-3.0, -2.0, -1.0], counts=[5, 2]),
    ]
    (group,) = group_runs([make_run("LoRA-FISH", 1, score_histograms=histograms)])
    shown = texts(to_svg(score_distribution(group), "x", "scores"))
    assert "lora_A: 100.0% are exactly 0" in shown
    assert "lora_B: 12.5% are exactly 0" in shown


def test_no_figure_without_data():
    """Guards against empty frames in the report, and crashes on runs that recorded nothing."""
    groups = group_runs([failed_run()])
    assert metric_by_arm(groups, "accuracy") is None
    assert training_loss(groups) is None
    assert validation_curve(groups, "accuracy") is None
    assert trade_off(groups, "accuracy") is None
    assert score_distribution(groups[0]) is None
    assert density_figure([]) is None
