"""Figures: what they show, read back from matplotlib and from the SVG itself."""

import math
import re
import warnings
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from fish_tuning import FishMask
from fish_tuning.experiments.report.figures import (
    density_figure,
    mask_figure,
    metric_by_arm,
    save_mask_picture,
    score_distribution,
    trade_off,
    training_loss,
    validation_curve,
)
from fish_tuning.experiments.report.statistics import group_runs
from fish_tuning.experiments.report.svg import to_svg
from fish_tuning.experiments.results import ScoreHistogram, TensorDensity
from tests.experiments.sweep_sample import failed_run, make_run, make_sweep


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter() if element.text]


def groups_of(**changes):
    return group_runs(make_sweep(**changes).runs)


def heatmap(axes):
    """The values that a panel's cells show, from the top row down."""
    return np.ma.filled(axes.collections[0].get_array(), np.nan)[::-1]


def test_metric_by_arm_has_every_dot_and_the_mean():
    """Guards a seed that is not drawn, and a line that is not at the mean."""
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
    """Guards curves averaged over unlike steps, a seed that is missing, and failed ones."""
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
    """Guards reports of many megabytes, and a curve thinned by dropping its end."""
    curve = [{"step": step, "loss": float(step % 2)} for step in range(1, 10_001)]
    (axes,) = training_loss(group_runs([make_run("LoRA-FISH", 1, train_curve=curve)])).axes
    (line,) = axes.get_lines()
    assert len(line.get_xdata()) == 200
    assert list(line.get_ydata()) == [0.5] * 200
    assert line.get_xdata()[-1] > 9_900


def test_trade_off_only_with_several_budgets():
    """Guards a figure of one point an arm, and counts in the wrong place."""
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
    """Guards hidden zeros, and a crash where all scores of a kind are 0."""
    histograms = [
        ScoreHistogram(kind="lora_A", zeros=30, log10_edges=[], counts=[]),
        ScoreHistogram(kind="lora_B", zeros=1, log10_edges=[-3.0, -2.0, -1.0], counts=[5, 2]),
    ]
    (group,) = group_runs([make_run("LoRA-FISH", 1, score_histograms=histograms)])
    shown = texts(to_svg(score_distribution(group), "x", "scores"))
    assert "lora_A: 100.0% are exactly 0" in shown
    assert "lora_B: 12.5% are exactly 0" in shown


def test_no_figure_without_data():
    """Guards empty frames in the report, and crashes on runs that recorded nothing."""
    groups = group_runs([failed_run()])
    assert metric_by_arm(groups, "accuracy") is None
    assert training_loss(groups) is None
    assert validation_curve(groups, "accuracy") is None
    assert trade_off(groups, "accuracy") is None
    assert score_distribution(groups[0]) is None
    assert density_figure([]) is None


def test_density_by_layer_and_module():
    """Guards cells in the wrong row, column or panel, and seeds that overwrite each other."""
    name = "base_model.model.bert.encoder.layer.{}.{}.lora_{}.default.weight"
    tensors = [
        TensorDensity(name=name.format(10, "attention.self.query", "A"), selected=1, entries=10),
        TensorDensity(name=name.format(10, "attention.self.query", "A"), selected=2, entries=10),
        TensorDensity(name=name.format(2, "attention.self.query", "A"), selected=5, entries=10),
        TensorDensity(name=name.format(2, "attention.output.dense", "B"), selected=4, entries=10),
        TensorDensity(name=name.format(2, "output.dense", "B"), selected=0, entries=10),
        TensorDensity(name="base_model.model.classifier.weight", selected=9, entries=9),
    ]
    figure = density_figure(tensors)
    a, b, _ = figure.axes
    assert [axes.get_title() for axes in (a, b)] == ["A", "B"]
    assert heatmap(a).tolist() == [[0.15], [0.5]]
    np.testing.assert_equal(heatmap(b), [[np.nan, np.nan], [0.4, 0.0]])
    assert [t.get_text() for t in a.get_yticklabels()] == ["2", "10"]
    assert [t.get_text() for t in b.get_xticklabels()] == [
        "attention.output.dense",
        "output.dense",
    ]
    assert figure.get_supxlabel() == "trained whole: classifier"


def test_mask_figure_counts_the_mask():
    """Guards a picture of anything but the mask: of a model's own weights here, no adapter."""
    tensor = torch.zeros(4, 5, dtype=torch.bool)
    tensor[0, :3] = True
    mask = FishMask({"layers.0.fc.weight": tensor, "layers.1.fc.weight": ~tensor})
    panel = mask_figure(mask).axes[0]
    assert heatmap(panel).tolist() == [[0.85], [0.15]]


@pytest.mark.parametrize("ending", ["png", "svg", "PNG"])
def test_mask_pictures(tmp_path, ending):
    """Guards files that are not what their ending says, that differ, or that are left half."""
    mask = FishMask({"layers.0.lora_A.weight": torch.eye(3).bool()})
    paths = [tmp_path / "new" / f"{name}.{ending}" for name in "ab"]
    for path in paths:
        save_mask_picture(mask, path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(paths[0].parent.iterdir()) == paths
    if ending == "svg":
        assert ElementTree.parse(paths[0]).getroot().tag.endswith("svg")
    else:
        assert imread(paths[0], format="png").shape[2] == 4


def test_mask_pictures_of_other_endings_are_refused(tmp_path):
    """Guards a PDF called .jpg, and an error that does not name the remedy."""
    mask = FishMask({"x": torch.ones(2).bool()})
    with pytest.raises(ValueError, match=r"a \.png or \.svg file, and '.*x\.jpg' is neither"):
        save_mask_picture(mask, tmp_path / "x.jpg")
    assert not list(tmp_path.iterdir())


def test_svg_keeps_names_as_text():
    """Guards markup, formulas and missing glyphs in names, with no warning to the user."""
    name = '<b>&"$x_1$ \u4e2d\n\x00]]>'
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = to_svg(metric_by_arm(group_runs([make_run(name, 1)]), "accuracy"), "x", name)
    assert '<b>&"$x_1$ \u4e2d ]]>' in texts(svg.replace("\x00", ""))


def test_svg_fits_into_a_page():
    """Guards ids that two figures share, rules and pictures of their own, and fixed colours."""
    groups = groups_of()
    figures = [
        to_svg(metric_by_arm(groups, "accuracy"), "one", "a"),
        to_svg(density_figure(t for run in groups[1].runs for t in run.mask_density), "two", "b"),
    ]
    ids = [set(re.findall(r'\bid="([^"]*)"', svg)) for svg in figures]
    assert all(ids) and not ids[0] & ids[1]
    for svg, known in zip(figures, ids, strict=True):
        assert set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', svg)) <= {
            pair for name in known for pair in ((name, ""), ("", name))
        }
        assert "<style" not in svg and "<image" not in svg and "<metadata" not in svg
        assert "var(--text, #1f2328)" in svg
        assert ElementTree.fromstring(svg).get("viewBox")


def test_figures_do_not_depend_on_the_users_settings():
    """Guards bytes that change with a matplotlibrc, and settings that leak out."""
    import matplotlib

    groups = groups_of(seeds=(1,))
    expected = to_svg(validation_curve(groups, "accuracy"), "x", "y")
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": False}):
        before = dict(matplotlib.rcParams)
        assert to_svg(validation_curve(groups, "accuracy"), "x", "y") == expected
        assert dict(matplotlib.rcParams) == before
