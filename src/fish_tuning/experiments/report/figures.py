"""Figures of a sweep: metrics, curves and scores of its arms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from fish_tuning.experiments.report.arm_runs import ArmRuns
from fish_tuning.experiments.report.statistics import spread
from fish_tuning.experiments.report.style import (
    COLORS,
    TEXT,
    WIDTH,
    color_by_arm,
    compact,
    figure_style,
    shorten,
)

_MAX_POINTS = 200


def metric_by_arm(groups: Sequence[ArmRuns], metric: str) -> Figure | None:
    """Draw a metric by arm: a dot per seed and a line at the mean; None if no run has it."""
    shown = [(group, values) for group in groups if (values := group.by_seed(metric))]
    if not shown:
        return None
    with figure_style():
        figure = Figure(figsize=(WIDTH, 0.85 + 0.36 * len(shown)))
        axes = figure.subplots()
        colors = color_by_arm(group.arm for group in groups)
        seeds = sorted({seed for _, values in shown for seed in values})
        for row, (group, values) in enumerate(shown):
            # A seed has the same height in every row, so that dots of equal values stay apart.
            heights = [row + 0.36 * _offset(seeds.index(seed), len(seeds)) for seed in values]
            axes.plot(
                list(values.values()), heights, "o", color=colors[group.arm], alpha=0.75, ms=5.5
            )
            if len(values) > 1:
                mean = sum(values.values()) / len(values)
                axes.plot([mean, mean], [row - 0.34, row + 0.34], color=TEXT, lw=2, zorder=1.9)
        axes.set_yticks(range(len(shown)), [shorten(group.label) for group, _ in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(shorten(metric))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.margins(x=0.08)
    return figure


def _offset(index: int, count: int) -> float:
    """Spread `count` positions evenly between -1 and 1."""
    return 2 * (index + 0.5) / count - 1 if count > 1 else 0.0


def training_loss(groups: Sequence[ArmRuns]) -> Figure | None:
    """Draw the training loss by step: a thin line per seed and their mean; None without any."""
    curves = [[_points(run.train_curve, "loss") for run in group.finished] for group in groups]
    return _curves(groups, curves, "training loss")


def validation_curve(groups: Sequence[ArmRuns], metric: str) -> Figure | None:
    """Draw a validation metric by step: a thin line per seed and their mean; None without any."""
    curves = [[_points(run.curve, metric) for run in group.finished] for group in groups]
    return _curves(groups, curves, f"validation {metric}", marker="o")


def _points(curve: Iterable[Mapping[str, float]], key: str) -> dict[float, float]:
    return {
        point["step"]: point[key]
        for point in curve
        if "step" in point and math.isfinite(point.get(key, math.nan))
    }


def _curves(
    groups: Sequence[ArmRuns],
    curves: Sequence[Sequence[Mapping[float, float]]],
    label: str,
    marker: str = "",
) -> Figure | None:
    shown = [
        (group, seeds)
        for group, of_group in zip(groups, curves, strict=True)
        if (seeds := [points for points in of_group if points])
    ]
    if not shown:
        return None
    with figure_style():
        figure = Figure(figsize=(WIDTH, 3.1 + 0.11 * (len(shown) + 1)))
        axes = figure.subplots()
        colors = color_by_arm(group.arm for group in groups)
        for group, seeds in shown:
            color = colors[group.arm]
            if len(seeds) > 1:
                for points in seeds:
                    axes.plot(*_thinned(points), lw=0.8, alpha=0.45, color=color)
            shared = sorted(set.intersection(*(set(points) for points in seeds)))
            means = {step: sum(points[step] for points in seeds) / len(seeds) for step in shared}
            axes.plot(
                *_thinned(means),
                lw=1.9,
                marker=marker if len(means) < 20 else "",
                ms=3.5,
                color=color,
                label=shorten(group.label),
            )
        axes.set_xlabel("step")
        axes.set_ylabel(shorten(label))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def _thinned(points: Mapping[float, float]) -> tuple[list[float], list[float]]:
    """Average neighboring points where there are more than a screen can show."""
    steps = sorted(points)
    size = -(-len(steps) // _MAX_POINTS)
    chunks = [steps[i : i + size] for i in range(0, len(steps), size)] if size else []
    return (
        [sum(chunk) / len(chunk) for chunk in chunks],
        [sum(points[step] for step in chunk) / len(chunk) for chunk in chunks],
    )


def trade_off(groups: Sequence[ArmRuns], metric: str) -> Figure | None:
    """Draw a metric against trainable parameters; None unless an arm ran at several budgets."""
    arms: dict[str, list[tuple[float, list[float]]]] = {}
    for group in groups:
        counts = spread(run.trainable_params for run in group.finished if run.trainable_params)
        if counts is not None and (values := group.by_seed(metric)):
            arms.setdefault(group.arm, []).append((counts.mean, list(values.values())))
    if all(len(points) < 2 for points in arms.values()):
        return None
    with figure_style():
        figure = Figure(figsize=(WIDTH, 3.1 + 0.11 * (len(arms) + 1)))
        axes = figure.subplots()
        colors = color_by_arm(group.arm for group in groups)
        for arm, points in arms.items():
            points.sort()
            for count, seeds in points:
                axes.plot([count] * len(seeds), seeds, "o", color=colors[arm], ms=4, alpha=0.5)
            axes.plot(
                [count for count, _ in points],
                [sum(seeds) / len(seeds) for _, seeds in points],
                color=colors[arm],
                marker="D" if len(points) == 1 else "",
                lw=1.9,
                label=shorten(arm),
            )
        counts_shown = sorted({count for points in arms.values() for count, _ in points})
        axes.set_xscale("log")
        axes.set_xticks(_far_apart(counts_shown))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: compact(x)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("trainable parameters")
        axes.set_ylabel(shorten(metric))
        axes.margins(x=0.1)
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def _far_apart(values: Sequence[float]) -> list[float]:
    """Drop values that are too close to the one before for a label each on a log axis."""
    least = np.log(values[-1] / values[0]) / 7
    kept: list[float] = []
    for value in values:
        if not kept or np.log(value / kept[-1]) > least:
            kept.append(value)
    return kept


def score_distribution(group: ArmRuns) -> Figure | None:
    """Draw the Fisher scores by kind of tensor, one line per seed; None without histograms."""
    kinds = sorted({hist.kind for run in group.finished for hist in run.score_histograms})
    if not kinds:
        return None
    with figure_style():
        figure = Figure(figsize=(WIDTH, 3.1 + 0.2 * len(kinds)))
        axes = figure.subplots()
        for kind, color in zip(kinds, COLORS, strict=False):
            histograms = [
                hist for run in group.finished for hist in run.score_histograms if hist.kind == kind
            ]
            zeros = sum(hist.zeros for hist in histograms)
            entries = zeros + sum(sum(hist.counts) for hist in histograms)
            share = zeros / max(1, entries)
            label = f"{shorten(kind)}: {share:.1%} are exactly 0" if zeros else shorten(kind)
            axes.plot([], [], color=color, label=label)
            for hist in histograms:
                # There are no bins where all scores are 0.
                if hist.counts:
                    axes.stairs(hist.counts, hist.log10_edges, color=color, lw=1.2, alpha=0.8)
        axes.set_xlabel("Fisher score")
        axes.set_ylabel("entries")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"1e{x:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: compact(y)))
        figure.legend(loc="outside lower center")
    return figure
