"""Pictures of what a mask selects."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fish_tuning.atomic import write_atomically
from fish_tuning.experiments.report.density import count_by_place, picture_kind, short_names
from fish_tuning.experiments.report.style import WIDTH, figure_style, shorten
from fish_tuning.experiments.results import TensorDensity, tensor_densities
from fish_tuning.mask import FishMask
from fish_tuning.names import Place

# Title of the panel of each side; the third is for what is not LoRA.
_PANELS = {"A": "A", "B": "B", "": "other"}


def density_figure(tensors: Iterable[TensorDensity]) -> Figure | None:
    """Draw the selected fraction by layer and module: a panel for A, for B and for other tensors.

    If there are A and B, modules outside the numbered layers that are trained in full (the head)
    are named, not drawn.

    Args:
        tensors: Tensors of one mask, or of several over which the figure shows the mean.

    Returns:
        The figure, or None without a tensor.
    """
    counts = count_by_place(tensors)
    heads = [
        place
        for place, (selected, entries) in counts.items()
        if not place.side and place.layer is None and selected == entries
    ]
    if not any(place.side for place in counts):
        heads = []
    densities = {place: count.density for place, count in counts.items() if place not in heads}
    if not densities:
        return None
    with figure_style():
        figure = heatmap(densities, "selected entries")
        if heads:
            names = ", ".join(place.module for place in heads)
            figure.supxlabel(f"trained in full: {shorten(names, 55)}", fontsize=9)
    return figure


def heatmap(densities: Mapping[Place, float], label: str) -> Figure:
    """Draw fractions: a panel per side, with a row per layer and a column per module.

    Args:
        densities: The fraction at each place.
        label: What the fraction is of.
    """
    panels = {
        side: list(dict.fromkeys(place.module for place in densities if place.side == side))
        for side in _PANELS
        if any(place.side == side for place in densities)
    }
    names = short_names({place.module for place in densities})
    # Modules outside the numbered layers come below all layers.
    layers = sorted({place.layer for place in densities}, key=lambda n: -1 if n is None else n)
    columns = sum(map(len, panels.values()))
    height = min(0.3, max(0.12, 7 / len(layers)))
    figure = Figure(figsize=(max(WIDTH, 1.6 + 0.26 * columns), 1.9 + height * len(layers)))
    all_axes = figure.subplots(
        1,
        len(panels),
        sharey=True,
        squeeze=False,
        width_ratios=[len(modules) for modules in panels.values()],
    )[0]
    highest = max(densities.values()) or 1.0
    for axes, (side, modules) in zip(all_axes, panels.items(), strict=True):
        values = np.array(
            [
                [densities.get(Place(layer, module, side), np.nan) for module in modules]
                for layer in layers
            ]
        )
        mesh = _draw_panel(axes, values, highest, [names[module] for module in modules])
        axes.set_title(_PANELS[side] if any(panels) else "")
        if columns <= 8 and height >= 0.17:
            _write_values(axes, values, highest)
    every = -(-len(layers) // max(1, int(height * len(layers) / 0.17)))
    all_axes[0].set_yticks(
        np.arange(0, len(layers), every) + 0.5,
        ["none" if layer is None else str(layer) for layer in layers[::every]],
    )
    all_axes[0].set_ylabel("layer")
    _draw_color_bar(figure, mesh, all_axes, label)
    return figure


def _draw_panel(axes: Axes, values: np.ndarray, highest: float, modules: Sequence[str]) -> QuadMesh:
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(values),
        # With this few colors the color bar is drawn, not embedded as a picture.
        cmap=colormaps["viridis"].resampled(32),
        vmin=0,
        vmax=highest,
        edgecolors="none",
        antialiased=False,
    )
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_xticks(
        np.arange(len(modules)) + 0.5,
        [shorten(name, 22) for name in modules],
        rotation=45,
        ha="right",
        rotation_mode="anchor",
    )
    return mesh


def _write_values(axes: Axes, values: np.ndarray, highest: float) -> None:
    """Write the percentages into the cells."""
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            axes.text(
                column + 0.5,
                row + 0.5,
                f"{100 * value:.0f}" if highest >= 0.1 else f"{100 * value:.1f}",
                ha="center",
                va="center_baseline",
                fontsize=8.5,
                color="#000000" if value > 0.55 * highest else "#ffffff",
            )


def _draw_color_bar(figure: Figure, mesh: QuadMesh, axes: Sequence[Axes], label: str) -> None:
    bar = figure.colorbar(mesh, ax=axes, location="top", aspect=45, pad=0.02)
    bar.set_label(label)
    bar.ax.xaxis.set_major_locator(MaxNLocator(5))
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:g}%"))
    bar.outline.set_visible(False)


def save_mask_picture(mask: FishMask, path: str | os.PathLike[str]) -> None:
    """Write a picture of a mask: the selected fraction by layer and module.

    Raises:
        ValueError: The file has the wrong ending, or the mask has no entries.
    """
    save_picture(mask_figure(mask), path)


def mask_figure(mask: FishMask) -> Figure:
    """Draw the selected fraction of a mask by layer and module."""
    figure = density_figure(tensor_densities(mask))
    if figure is None:
        raise ValueError("The mask has no entries, so it has no picture.")
    return figure


def save_picture(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure atomically to a `.png` or `.svg` file.

    Raises:
        ValueError: The file has another ending.
    """
    kind = picture_kind(path)
    stream = io.BytesIO()
    with figure_style():
        figure.savefig(
            stream,
            format=kind,
            dpi=160,
            facecolor="white",
            metadata={"Date": None} if kind == "svg" else {"Software": None},
        )
    write_atomically(Path(path), stream.getvalue())
