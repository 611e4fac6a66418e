"""Figures as elements of a page, read back from the SVG."""

import re
import warnings
import xml.etree.ElementTree as ElementTree

from fish_tuning.experiments.report.arm_runs import group_runs
from fish_tuning.experiments.report.density_figure import density_figure
from fish_tuning.experiments.report.figures import metric_by_arm, validation_curve
from fish_tuning.experiments.report.svg import to_svg
from tests.experiments.sweep_sample import make_run, make_sweep


def texts(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter() if element.text]


def groups_of(**changes):
    return group_runs(make_sweep(**changes).runs)


def test_svg_keeps_names_as_text():
    """Guards markup, formulas and missing glyphs in names, with no warning to the user."""
    name = '<b>&"$x_1$ \u4e2d\n\x00]]>'
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svg = to_svg(metric_by_arm(group_runs([make_run(name, 1)]), "accuracy"), "x", name)
    assert '<b>&"$x_1$ \u4e2d ]]>' in texts(svg.replace("\x00", ""))


def test_svg_fits_into_a_page():
    """Guards against ids that two figures share, rules and pictures of their own, and fixed
    colors."""
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
    """Guards against bytes that change with a matplotlibrc, and settings that leak out."""
    import matplotlib

    groups = groups_of(seeds=(1,))
    expected = to_svg(validation_curve(groups, "accuracy"), "x", "y")
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": False}):
        before = dict(matplotlib.rcParams)
        assert to_svg(validation_curve(groups, "accuracy"), "x", "y") == expected
        assert dict(matplotlib.rcParams) == before
