"""Where scores are high: by layer and module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from fish_tuning.experiments.report.figures.density import short_names
from fish_tuning.experiments.tables import Table
from fish_tuning.names import Place, place_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class ScoreSum(NamedTuple):
    """The sum of some scores, and how many there are."""

    total: float
    entries: int

    @property
    def mean(self) -> float:
        """The mean score."""
        return self.total / self.entries


def sum_by_place(scores: Mapping[str, Tensor]) -> dict[Place, ScoreSum]:
    """Add up the scores of tensors at the same place."""
    sums: dict[Place, ScoreSum] = {}
    for name, tensor in scores.items():
        if tensor.numel():
            place = place_of(name)
            total, entries = sums.get(place, (0.0, 0))
            total += float(tensor.detach().double().sum())
            sums[place] = ScoreSum(total, entries + tensor.numel())
    return sums


def score_tables(scores: Mapping[str, Tensor]) -> dict[str, Table]:
    """Mean scores: a table for each side of LoRA, with a row per layer and a column per module.

    Returns:
        The tables by side; the side of tensors that are not LoRA's is "".
    """
    sums = sum_by_place(scores)
    names = short_names(place.module for place in sums)
    sides = sorted({place.side for place in sums}, key=lambda side: side or "other")
    return {
        side: _table({p: s for p, s in sums.items() if p.side == side}, names) for side in sides
    }


def _table(sums: Mapping[Place, ScoreSum], names: Mapping[str, str]) -> Table:
    modules = list(dict.fromkeys(place.module for place in sums))

    def mean(layer: int | None, all_layers: bool, module: str | None) -> str:
        chosen = [
            found
            for place, found in sums.items()
            if (all_layers or place.layer == layer) and module in (None, place.module)
        ]
        entries = sum(found.entries for found in chosen)
        return f"{sum(found.total for found in chosen) / entries:.1e}" if entries else ""

    rows = [(layer, False) for layer in dict.fromkeys(place.layer for place in sums)]
    return Table(
        ("layer", *(names[module] for module in modules), "all"),
        tuple(
            (
                "all" if all_layers else "-" if layer is None else str(layer),
                *(mean(layer, all_layers, module) for module in (*modules, None)),
            )
            for layer, all_layers in [*rows, (None, True)]
        ),
    )


def score_figure(scores: Mapping[str, Tensor]) -> Figure:
    """Draw the root of the mean score by layer and module, relative to the highest of each side.

    Scores are mean squares of gradients, so their roots are the size of a gradient.

    Raises:
        ValueError: There are no scores, or some are negative.
    """
    from fish_tuning.experiments.report.figures.picture import heatmap

    means = {place: found.mean for place, found in sum_by_place(scores).items()}
    if not means or min(means.values()) < 0:
        raise ValueError("Only Fisher information can be drawn: give scores that are not negative.")
    highest: dict[str, float] = {}
    for place, mean in means.items():
        highest[place.side] = max(highest.get(place.side, 0.0), mean)
    roots = {place: (mean / (highest[place.side] or 1.0)) ** 0.5 for place, mean in means.items()}
    return heatmap(roots, "root of the mean score, relative to the highest")
