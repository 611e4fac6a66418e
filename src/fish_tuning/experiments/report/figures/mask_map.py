"""The interactive map of what a mask selects."""

from __future__ import annotations

from collections.abc import Iterable

import plotly.graph_objects as go

from fish_tuning.experiments.report.figures.density import mask_densities, panels
from fish_tuning.experiments.report.figures.style import shorten
from fish_tuning.experiments.report.figures.sweep import figure_of, label
from fish_tuning.experiments.results import TensorDensity

_GAP = 0.03


def highest_density(masks: Iterable[Iterable[TensorDensity]]) -> float:
    """Return the highest density that any of several maps shows, the end of their color scale."""
    return max((d for tensors in masks for d in mask_densities(tensors)[0].values()), default=1.0)


def mask_map(tensors: Iterable[TensorDensity], highest: float) -> go.Figure | None:
    """Draw the selected fraction by layer and module: a panel for A, for B and for other tensors.

    Args:
        tensors: Tensors of one mask, or of several over which the map shows the mean.
        highest: The density at the end of the color scale.

    Returns:
        The figure, or None without a tensor.
    """
    densities, _ = mask_densities(tensors)
    if not densities:
        return None
    maps = panels(densities)
    columns = [len(panel.modules) for panel in maps]
    share = (1 - _GAP * (len(maps) - 1)) / sum(columns)
    figure = figure_of(height=150 + max(90, min(22 * len(maps[0].layers), 560)))
    left = 0.0
    for number, (panel, width) in enumerate(zip(maps, columns, strict=True), start=1):
        suffix = "" if number == 1 else str(number)
        figure.add_heatmap(
            x=list(range(width)),
            y=list(range(len(panel.layers))),
            z=panel.values,
            customdata=[[[row, name] for name in panel.modules] for row in panel.layers],
            hovertemplate=f"layer %{{customdata[0]}}, %{{customdata[1]}} {label(panel.title)}"
            "<br>%{z:.2%} selected<extra></extra>",
            texttemplate="%{z:.0%}" if highest >= 0.1 else "%{z:.1%}",
            coloraxis="coloraxis",
            hoverongaps=False,
            xaxis=f"x{suffix}",
            yaxis="y",
            xgap=1,
            ygap=1,
        )
        figure.layout[f"xaxis{suffix}"] = {
            "domain": [left, left + share * width],
            "title": {"text": label(panel.title)},
            "tickvals": list(range(width)),
            "ticktext": [label(shorten(name, 16)) for name in panel.modules],
            "tickangle": -45,
            "showgrid": False,
            "zeroline": False,
            "automargin": True,
        }
        left += share * width + _GAP
    every = -(-len(maps[0].layers) // 28)
    figure.update_layout(
        yaxis={
            "tickvals": list(range(0, len(maps[0].layers), every)),
            "ticktext": [label(name) for name in maps[0].layers[::every]],
            "title": {"text": "layer"},
            "autorange": "reversed",
            "showgrid": False,
            "zeroline": False,
        },
        coloraxis={
            "cmin": 0,
            "cmax": highest,
            "colorscale": "Viridis",
            "colorbar": {"tickformat": ".0%" if highest >= 0.1 else ".1%", "thickness": 10},
        },
    )
    return figure
