"""Interactive figures of a sweep: metrics, curves and scores of its arms.

Colors of text and lines are left to the page, which knows whether it is light or dark. A trace's
`meta` is the arm that it belongs to, by which the page hides it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

import plotly.graph_objects as go

from fish_tuning.experiments.metrics.names import greater_is_better
from fish_tuning.experiments.report.arm_runs import ArmRuns
from fish_tuning.experiments.report.figures.style import COLORS, shorten
from fish_tuning.experiments.report.statistics import Spread, spread
from fish_tuning.experiments.report.summary_table import metric_title

_MAX_POINTS = 200
_ROW = 44
"""Height of an arm's row, in pixels: a line of text, and the dots below it."""


def figure_of(*, height: int, **layout: Any) -> go.Figure:
    """Return an empty figure, whose theme the page chooses."""
    margin = {"l": 8, "r": 12, "t": 12, "b": 8}
    shared = {"template": "none", "height": height, "margin": margin, "showlegend": False}
    figure = go.Figure(layout={**shared, **layout})
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    return figure


def label(text: str) -> str:
    """Make text show as it is, where plotly would see markup, templates or formulas."""
    return escape(text).replace("{", "&#123;").replace("$", "&#36;")


def metric_by_arm(
    groups: Sequence[ArmRuns], metric: str, colors: Mapping[str, str]
) -> go.Figure | None:
    """Draw a metric by arm: a dot per seed and a line at the mean; None if no run has it."""
    shown = [(group, values) for group in groups if (values := group.by_seed(metric))]
    if not shown:
        return None
    seeds = sorted({seed for _, values in shown for seed in values})
    figure = figure_of(height=60 + _ROW * len(shown))
    for row, (group, values) in enumerate(shown):
        name, color = label(group.label), colors[group.arm]
        # A seed has the same height in every row, so that dots of equal values stay apart.
        heights = [row + 0.2 + 0.16 * _offset(seeds.index(seed), len(seeds)) for seed in values]
        figure.add_scatter(
            x=list(values.values()),
            y=heights,
            mode="markers",
            marker={"color": color, "size": 9, "opacity": 0.8},
            text=[f"{name}, seed {seed}<br>{value:.4f}" for seed, value in values.items()],
            hoverinfo="text",
            meta=group.arm,
        )
        if len(values) > 1:
            mean = sum(values.values()) / len(values)
            figure.add_scatter(
                x=[mean, mean],
                y=[row + 0.02, row + 0.38],
                mode="lines",
                line={"color": color, "width": 3},
                text=f"{name}, mean of {len(values)} seeds<br>{mean:.4f}",
                hoverinfo="text",
                meta=group.arm,
            )
    figure.update_yaxes(
        tickvals=list(range(len(shown))),
        ticktext=[label(shorten(group.label, 40)) for group, _ in shown],
        ticklabelposition="inside top",
        range=[len(shown) - 0.5, -0.6],
        zeroline=False,
    )
    figure.update_xaxes(title={"text": label(shorten(metric_title(metric)))}, zeroline=False)
    return figure


def _offset(index: int, count: int) -> float:
    """Spread `count` positions evenly between -1 and 1."""
    return 2 * (index + 0.5) / count - 1 if count > 1 else 0.0


def training_loss(groups: Sequence[ArmRuns], colors: Mapping[str, str]) -> go.Figure | None:
    """Draw the training loss by step: a thin line per seed and their mean; None without any."""
    curves = [[_points(run.train_curve, "loss") for run in group.finished] for group in groups]
    return _curves(groups, curves, colors, "training loss")


def validation_curve(
    groups: Sequence[ArmRuns], metric: str, colors: Mapping[str, str]
) -> go.Figure | None:
    """Draw a validation metric by step: a thin line per seed and their mean; None without any."""
    curves = [[_points(run.curve, metric) for run in group.finished] for group in groups]
    return _curves(
        groups, curves, colors, f"validation {metric_title(metric)}", mode="lines+markers"
    )


def _points(curve: Iterable[Mapping[str, float]], key: str) -> dict[float, float]:
    return {
        point["step"]: point[key]
        for point in curve
        if "step" in point and math.isfinite(point.get(key, math.nan))
    }


def _curves(
    groups: Sequence[ArmRuns],
    curves: Sequence[Sequence[Mapping[float, float]]],
    colors: Mapping[str, str],
    title: str,
    mode: str = "lines",
) -> go.Figure | None:
    shown = [
        (group, seeds)
        for group, of_group in zip(groups, curves, strict=True)
        if (seeds := [points for points in of_group if points])
    ]
    if not shown:
        return None
    figure = figure_of(height=330)
    for group, seeds in shown:
        color = colors[group.arm]
        if len(seeds) > 1:
            for points in seeds:
                line = {"color": color, "width": 1}
                figure.add_scatter(
                    **_thinned(points), mode="lines", line=line, opacity=0.4, hoverinfo="skip"
                )
                figure.data[-1].meta = group.arm
        shared = sorted(set.intersection(*(set(points) for points in seeds)))
        means = {step: sum(points[step] for points in seeds) / len(seeds) for step in shared}
        figure.add_scatter(
            **_thinned(means),
            mode=mode if len(means) < 20 else "lines",
            line={"color": color, "width": 2.5},
            hovertemplate=f"{label(group.label)}<br>step %{{x:,.0f}}: %{{y:.4f}}<extra></extra>",
            meta=group.arm,
        )
    figure.update_xaxes(title={"text": "step"}, rangemode="tozero", zeroline=False)
    figure.update_yaxes(title={"text": label(shorten(title))}, zeroline=False)
    return figure


def _thinned(points: Mapping[float, float]) -> dict[str, list[float]]:
    """Average neighboring points where there are more than a screen can show."""
    steps = sorted(points)
    size = -(-len(steps) // _MAX_POINTS)
    chunks = [steps[i : i + size] for i in range(0, len(steps), size)] if size else []
    return {
        "x": [sum(chunk) / len(chunk) for chunk in chunks],
        "y": [sum(points[step] for step in chunk) / len(chunk) for chunk in chunks],
    }


def trade_off(
    groups: Sequence[ArmRuns], metric: str, colors: Mapping[str, str]
) -> go.Figure | None:
    """Draw a metric against trainable parameters, with the Pareto front.

    The front goes through the means that no other arm beats with as few parameters.

    Returns:
        The figure, or None if all arms have the same number of parameters.
    """
    means: list[tuple[ArmRuns, float, Spread]] = []
    for group in groups:
        counts = spread(run.trainable_params for run in group.finished if run.trainable_params)
        values = spread(group.by_seed(metric).values())
        if counts is not None and values is not None:
            means.append((group, counts.mean, values))
    if len({count for _, count, _ in means}) < 2:
        return None
    figure = figure_of(height=360)
    front = pareto_front([(count, values.mean) for _, count, values in means], metric)
    figure.add_scatter(
        x=[count for count, _ in front],
        y=[value for _, value in front],
        mode="lines",
        line={"shape": "hv", "dash": "dot", "width": 1.5, "color": "#8a939c"},
        hoverinfo="skip",
        name="Pareto front",
    )
    for arm in dict.fromkeys(group.arm for group, _, _ in means):
        of_arm = sorted((m for m in means if m[0].arm == arm), key=lambda m: m[1])
        texts = [
            f"{label(group.label)}<br>{count:,.0f} trained parameters<br>{values.mean:.4f}"
            + (f" ± {values.std:.4f}, {values.count} seeds" if values.std is not None else "")
            + ("<br>on the Pareto front" if (count, values.mean) in front else "")
            for group, count, values in of_arm
        ]
        figure.add_scatter(
            x=[count for _, count, _ in of_arm],
            y=[values.mean for _, _, values in of_arm],
            error_y={"array": [values.std or 0 for _, _, values in of_arm], "thickness": 1},
            mode="lines+markers",
            line={"color": colors[arm], "width": 1.5},
            marker={"size": 9},
            text=texts,
            hoverinfo="text",
            meta=arm,
        )
    figure.update_xaxes(type="log", title={"text": "trained parameters"}, **_log_ticks(means))
    figure.update_yaxes(title={"text": label(shorten(metric_title(metric)))}, zeroline=False)
    return figure


def pareto_front(points: Iterable[tuple[float, float]], metric: str) -> list[tuple[float, float]]:
    """Return the points that no other point beats, from the fewest parameters up.

    Args:
        points: Number of parameters and metric of each arm.
        metric: The metric, which says whether higher is better.
    """
    sign = -1 if greater_is_better(metric) else 1
    front: list[tuple[float, float]] = []
    for count, value in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if not front or sign * value < sign * front[-1][1]:
            front.append((count, value))
    return front


def _log_ticks(means: Sequence[tuple[ArmRuns, float, Spread]]) -> dict[str, Any]:
    """Ticks at the counts themselves, without those that are too close to the one before."""
    counts = sorted({count for _, count, _ in means})
    least = math.log(counts[-1] / counts[0]) / 6
    kept: list[float] = []
    for count in counts:
        if not kept or math.log(count / kept[-1]) > least:
            kept.append(count)
    return {"tickvals": kept, "ticktext": [_compact(count) for count in kept]}


def _compact(value: float) -> str:
    """Write a count in few characters: 28,418 is 28.4k."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def score_distribution(group: ArmRuns) -> go.Figure | None:
    """Draw the Fisher scores by kind of tensor, one line per seed; None without histograms."""
    kinds = sorted({hist.kind for run in group.finished for hist in run.score_histograms})
    if not kinds:
        return None
    figure = figure_of(height=330, showlegend=True, legend={"orientation": "h", "y": 1.02})
    figure.update_layout(legend={"yanchor": "bottom", "x": 0})
    for kind, color in zip(kinds, COLORS, strict=False):
        histograms = [
            hist for run in group.finished for hist in run.score_histograms if hist.kind == kind
        ]
        zeros = sum(hist.zeros for hist in histograms)
        entries = zeros + sum(sum(hist.counts) for hist in histograms)
        name = label(shorten(kind))
        if zeros:
            name += f": {zeros / max(1, entries):.1%} are exactly 0"
        for position, hist in enumerate(histograms):
            edges = hist.log10_edges
            figure.add_scatter(
                # Without a bin, a point that is not drawn keeps the kind in the legend.
                x=[(a + b) / 2 for a, b in pairwise(edges)] if edges else [None],
                y=hist.counts if edges else [None],
                mode="lines",
                line={"shape": "hvh", "color": color, "width": 1.5},
                name=name,
                legendgroup=kind,
                showlegend=position == 0,
                hovertemplate="score 1e%{x:.1f}: %{y:,} entries<extra></extra>",
            )
    figure.update_xaxes(title={"text": "Fisher score"}, tickprefix="1e", dtick=2, zeroline=False)
    figure.update_yaxes(title={"text": "entries"}, rangemode="tozero")
    return figure
