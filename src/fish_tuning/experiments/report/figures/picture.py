"""Pictures of masks and scores as files, for `fish-tuning inspect --picture`."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fish_tuning.atomic import write_atomically
from fish_tuning.experiments.report.figures.density import mask_densities, panels
from fish_tuning.experiments.report.figures.style import shorten
from fish_tuning.experiments.results import tensor_densities
from fish_tuning.mask import FishMask
from fish_tuning.names import Place

_STYLE: dict[str, Any] = {
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "fish-tuning",
    # Names from files may contain dollar signs.
    "text.parse_math": False,
}


@contextmanager
def picture_style() -> Iterator[None]:
    """Draw and save pictures in one style, whatever the user's own settings."""
    with matplotlib.style.context(["default", _STYLE]):
        yield


def save_mask_picture(mask: FishMask, path: str | os.PathLike[str]) -> None:
    """Write a picture of a mask: the selected fraction by layer and module.

    Raises:
        ValueError: The file has the wrong ending, or the mask has no entries.
    """
    save_picture(mask_figure(mask), path)


def mask_figure(mask: FishMask) -> Figure:
    """Draw the selected fraction of a mask by layer and module."""
    densities, heads = mask_densities(tensor_densities(mask))
    if not densities:
        raise ValueError("The mask has no entries, so it has no picture.")
    figure = heatmap(densities, "selected entries")
    if heads:
        figure.supxlabel(f"trained in full: {shorten(', '.join(heads), 55)}", fontsize=9)
    return figure


def heatmap(values: Mapping[Place, float], label: str) -> Figure:
    """Draw fractions: a panel per side, with a row per layer and a column per module.

    Args:
        values: The fraction at each place.
        label: What the fraction is of.
    """
    maps = panels(values)
    layers, columns = len(maps[0].layers), sum(len(panel.modules) for panel in maps)
    height = min(0.3, max(0.12, 7 / layers))
    with picture_style():
        figure = Figure(figsize=(max(4.7, 1.6 + 0.26 * columns), 1.9 + height * layers))
        widths = [len(panel.modules) for panel in maps]
        all_axes = figure.subplots(1, len(maps), sharey=True, squeeze=False, width_ratios=widths)[0]
        for axes, panel in zip(all_axes, maps, strict=True):
            image = axes.imshow(
                np.array(panel.values, dtype=float),
                aspect="auto",
                interpolation="nearest",
                vmin=0,
                vmax=max(values.values()) or 1.0,
            )
            axes.set_title(panel.title)
            axes.set_xticks(
                range(len(panel.modules)),
                [shorten(name, 22) for name in panel.modules],
                rotation=45,
                ha="right",
                rotation_mode="anchor",
            )
        every = -(-layers // max(1, int(height * layers / 0.17)))
        all_axes[0].set_yticks(range(0, layers, every), maps[0].layers[::every])
        all_axes[0].set_ylabel("layer")
        figure.colorbar(
            image,
            ax=all_axes,
            location="top",
            aspect=45,
            pad=0.02,
            label=label,
            format=PercentFormatter(1),
        )
    return figure


def picture_kind(path: str | os.PathLike[str]) -> str:
    """The format that a picture's file name asks for: "png" or "svg".

    Raises:
        ValueError: The name has another ending.
    """
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise ValueError(f"A picture is a .png or .svg file, and {str(path)!r} is neither.")
    return kind


def save_picture(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure atomically to a `.png` or `.svg` file.

    Raises:
        ValueError: The file has another ending.
    """
    kind = picture_kind(path)
    stream = io.BytesIO()
    with picture_style():
        figure.savefig(
            stream,
            format=kind,
            dpi=160,
            facecolor="white",
            metadata={"Date": None} if kind == "svg" else {"Software": None},
        )
    write_atomically(Path(path), stream.getvalue())
