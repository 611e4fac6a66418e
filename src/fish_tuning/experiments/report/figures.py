"""Figures of a sweep and of a mask, for reports and for the command line."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from fish_tuning.atomic import write_atomically
from fish_tuning.experiments.report.statistics import Group, spread
from fish_tuning.experiments.report.svg import TEXT, figure_style, shorten
from fish_tuning.experiments.results import TensorDensity
from fish_tuning.names import place_of

if TYPE_CHECKING:
    from fish_tuning.mask.mask import FishMask

# Readable on white and on near-black alike.
_COLORS = (
    "#3b7dd8",
    "#d9701e",
    "#2f9e5f",
    "#d6455d",
    "#8b6fd1",
    "#1f9aa8",
    "#a8763e",
    "#c2569b",
)

# Inches of 72 SVG units. Narrow, so that text stays readable on a phone.
_WIDTH = 4.7
_MAX_POINTS = 200


def metric_by_arm(groups: Sequence[Group], metric: str) -> Figure | None:
    """Every seed's value as a dot and the mean as a line; None if no run has the metric."""
    shown = [(group, values) for group in groups if (values := group.by_seed(metric))]
    if not shown:
        return None
    with figure_style():
        figure = Figure(figsize=(_WIDTH, 0.85 + 0.36 * len(shown)))
        axes = figure.subplots()
        colors = _color_by_arm(groups)
        seeds = sorted({seed for _, values in shown for seed in values})
        for row, (group, values) in enumerate(shown):
            # A seed keeps its place within every row, so that equal values stay apart.
            places = [row + 0.36 * (_place(seeds.index(seed), len(seeds))) for seed in values]
            axes.plot(
                list(values.values()), places, "o", color=colors[group.arm], alpha=0.75, ms=5.5
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


def training_loss(groups: Sequence[Group]) -> Figure | None:
    """Training loss by step, a thin line a seed and their mean; None without a curve."""
    curves = [[_points(run.train_curve, "loss") for run in group.finished] for group in groups]
    return _curves(groups, curves, "training loss")


def validation_curve(groups: Sequence[Group], metric: str) -> Figure | None:
    """A validation metric by step, a thin line a seed and their mean; None without a curve."""
    curves = [[_points(run.curve, metric) for run in group.finished] for group in groups]
    return _curves(groups, curves, f"validation {metric}", marker="o")


def _points(curve: Iterable[Mapping[str, float]], key: str) -> dict[float, float]:
    return {
        point["step"]: point[key]
        for point in curve
        if "step" in point and math.isfinite(point.get(key, math.nan))
    }


def _curves(
    groups: Sequence[Group],
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
        figure = Figure(figsize=(_WIDTH, 3.1 + 0.11 * (len(shown) + 1)))
        axes = figure.subplots()
        colors = _color_by_arm(groups)
        for group, seeds in shown:
            color = colors[group.arm]
            if len(seeds) > 1:
                for points in seeds:
                    axes.plot(*_thin(points), lw=0.8, alpha=0.45, color=color)
            common = sorted(set.intersection(*(set(points) for points in seeds)))
            means = {x: sum(points[x] for points in seeds) / len(seeds) for x in common}
            axes.plot(
                *_thin(means),
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


def _thin(points: Mapping[float, float]) -> tuple[list[float], list[float]]:
    """Means over neighbouring points where there are more than a screen can show."""
    steps = sorted(points)
    size = -(-len(steps) // _MAX_POINTS)
    chunks = [steps[i : i + size] for i in range(0, len(steps), size)] if size else []
    return (
        [sum(chunk) / len(chunk) for chunk in chunks],
        [sum(points[step] for step in chunk) / len(chunk) for chunk in chunks],
    )


def trade_off(groups: Sequence[Group], metric: str) -> Figure | None:
    """A metric against trainable parameters; None unless an arm ran at several budgets."""
    arms: dict[str, list[tuple[float, list[float]]]] = {}
    for group in groups:
        counts = spread(run.trainable_params for run in group.finished if run.trainable_params)
        if counts is not None and (values := group.by_seed(metric)):
            arms.setdefault(group.arm, []).append((counts.mean, list(values.values())))
    if all(len(points) < 2 for points in arms.values()):
        return None
    with figure_style():
        figure = Figure(figsize=(_WIDTH, 3.1 + 0.11 * (len(arms) + 1)))
        axes = figure.subplots()
        colors = _color_by_arm(groups)
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
        axes.set_xticks(_spaced(counts_shown))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _compact(x)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("trainable parameters")
        axes.set_ylabel(shorten(metric))
        axes.margins(x=0.1)
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def _spaced(values: Sequence[float]) -> list[float]:
    """Those that are far enough apart on a logarithmic axis for a label each."""
    least = np.log(values[-1] / values[0]) / 7
    kept: list[float] = []
    for value in values:
        if not kept or np.log(value / kept[-1]) > least:
            kept.append(value)
    return kept


def score_distribution(group: Group) -> Figure | None:
    """Fisher scores by kind of tensor, one line a seed; None without histograms."""
    kinds = sorted({hist.kind for run in group.finished for hist in run.score_histograms})
    if not kinds:
        return None
    with figure_style():
        figure = Figure(figsize=(_WIDTH, 3.1 + 0.2 * len(kinds)))
        axes = figure.subplots()
        for kind, color in zip(kinds, _COLORS, strict=False):
            histograms = [
                hist for run in group.finished for hist in run.score_histograms if hist.kind == kind
            ]
            zeros = sum(hist.zeros for hist in histograms)
            entries = zeros + sum(sum(hist.counts) for hist in histograms)
            share = zeros / max(1, entries)
            label = f"{shorten(kind)}: {share:.1%} are exactly 0" if zeros else shorten(kind)
            axes.plot([], [], color=color, label=label)
            for hist in histograms:
                # Without counts all scores are 0.
                if hist.counts:
                    axes.stairs(hist.counts, hist.log10_edges, color=color, lw=1.2, alpha=0.8)
        axes.set_xlabel("Fisher score")
        axes.set_ylabel("entries")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"1e{x:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _compact(y)))
        figure.legend(loc="outside lower center")
    return figure


def density_figure(tensors: Iterable[TensorDensity]) -> Figure | None:
    """Selected share by layer and module, one panel for A, one for B, one for other tensors.

    Entries of the same place, such as those of several seeds, are added up. Beside A and B, what
    lies outside the numbered layers and is trained whole (the head) is named and not drawn.

    Returns:
        The figure, None where there is no tensor.
    """
    placed = [(place_of(tensor.name), tensor) for tensor in tensors if tensor.entries]
    if not placed:
        return None
    whole: dict[str, None] = {}
    if any(place.side for place, _ in placed):
        heads = [
            (place, tensor)
            for place, tensor in placed
            if not place.side and place.layer is None and tensor.selected == tensor.entries
        ]
        whole = dict.fromkeys(place.module for place, _ in heads)
        placed = [item for item in placed if item not in heads]
    names = _short_names({place.module for place, _ in placed})
    counts: dict[tuple[str, int, str], tuple[int, int]] = {}
    for place, tensor in placed:
        # Below all numbered layers.
        layer = -1 if place.layer is None else place.layer
        key = (place.side or "other", layer, place.module)
        selected, entries = counts.get(key, (0, 0))
        counts[key] = (selected + tensor.selected, entries + tensor.entries)
    densities = {key: selected / entries for key, (selected, entries) in counts.items()}
    layers = sorted({layer for _, layer, _ in densities})
    panels = {
        side: list(dict.fromkeys(module for s, _, module in densities if s == side))
        for side in ("A", "B", "other")
        if any(s == side for s, _, _ in densities)
    }
    with figure_style():
        return _heatmap(densities, layers, panels, names, list(whole))


def _heatmap(
    densities: Mapping[tuple[str, int, str], float],
    layers: Sequence[int],
    panels: Mapping[str, Sequence[str]],
    names: Mapping[str, str],
    whole: Sequence[str],
) -> Figure:
    columns = sum(map(len, panels.values()))
    height = min(0.3, max(0.12, 7 / len(layers)))
    figure = Figure(figsize=(max(_WIDTH, 1.6 + 0.26 * columns), 1.9 + height * len(layers)))
    all_axes = figure.subplots(
        1,
        len(panels),
        sharey=True,
        squeeze=False,
        width_ratios=[len(modules) for modules in panels.values()],
    )[0]
    highest = max(densities.values()) or 1.0
    every = -(-len(layers) // max(1, int(height * len(layers) / 0.17)))
    mesh = None
    for axes, (side, modules) in zip(all_axes, panels.items(), strict=True):
        values = np.array(
            [
                [densities.get((side, layer, module), np.nan) for module in modules]
                for layer in layers
            ]
        )
        mesh = axes.pcolormesh(
            np.ma.masked_invalid(values),
            # Few enough colours that the colour bar is drawn, not embedded as a picture.
            cmap=colormaps["viridis"].resampled(32),
            vmin=0,
            vmax=highest,
            edgecolors="none",
            antialiased=False,
        )
        axes.set_title(side if panels.keys() != {"other"} else "")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xticks(
            np.arange(len(modules)) + 0.5,
            [shorten(names[module], 22) for module in modules],
            rotation=45,
            ha="right",
            rotation_mode="anchor",
        )
        axes.set_yticks(
            np.arange(0, len(layers), every) + 0.5,
            ["none" if layer < 0 else str(layer) for layer in layers[::every]],
        )
        if columns <= 8 and height >= 0.17:
            for (row, column), value in np.ndenumerate(values):
                if not np.isnan(value):
                    axes.text(
                        column + 0.5,
                        row + 0.5,
                        _percent_number(value, highest),
                        ha="center",
                        va="center_baseline",
                        fontsize=8.5,
                        color="#000000" if value > 0.55 * highest else "#ffffff",
                    )
    all_axes[0].set_ylabel("layer")
    assert mesh is not None
    bar = figure.colorbar(mesh, ax=all_axes, location="top", aspect=45, pad=0.02)
    bar.set_label("selected entries")
    bar.ax.xaxis.set_major_locator(MaxNLocator(5))
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}%"))
    bar.outline.set_visible(False)
    if whole:
        figure.supxlabel(f"trained whole: {shorten(', '.join(whole), 55)}", fontsize=9)
    return figure


def _percent_number(value: float, highest: float) -> str:
    return f"{100 * value:.0f}" if highest >= 0.1 else f"{100 * value:.1f}"


def mask_figure(mask: FishMask) -> Figure:
    """Picture a mask: the selected share by layer and module."""
    figure = density_figure(
        TensorDensity(name=name, selected=int(tensor.count_nonzero()), entries=tensor.numel())
        for name, tensor in mask.items()
    )
    if figure is None:
        raise ValueError("The mask has no entries, so there is nothing to picture.")
    return figure


def save_mask_picture(mask: FishMask, path: str | os.PathLike[str]) -> None:
    """Write the picture of a mask, whole or not at all.

    Args:
        mask: The mask.
        path: A file that ends in `.png` or `.svg`.

    Raises:
        ValueError: It has another ending.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise ValueError(f"A mask's picture is a .png or .svg file, and {str(path)!r} is neither.")
    figure = mask_figure(mask)
    stream = io.BytesIO()
    with figure_style():
        figure.savefig(
            stream,
            format=kind,
            dpi=160,
            facecolor="white",
            metadata={"Date": None} if kind == "svg" else {"Software": None},
        )
    write_atomically(path, stream.getvalue())


def _short_names(modules: Iterable[str]) -> dict[str, str]:
    """The shortest ends of paths that still tell them apart."""
    paths = {module: module.split(".") for module in modules}
    names = {}
    for module, path in paths.items():
        others = [other for key, other in paths.items() if key != module]
        length = 1
        while length < len(path) and any(path[-length:] == other[-length:] for other in others):
            length += 1
        names[module] = ".".join(path[-length:])
    return names


def _compact(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def _place(index: int, count: int) -> float:
    return 2 * (index + 0.5) / count - 1 if count > 1 else 0.0


def _color_by_arm(groups: Sequence[Group]) -> dict[str, str]:
    arms = dict.fromkeys(group.arm for group in groups)
    return {arm: _COLORS[i % len(_COLORS)] for i, arm in enumerate(arms)}
