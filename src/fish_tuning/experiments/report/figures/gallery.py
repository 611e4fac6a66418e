"""Which figures a sweep's report shows, with titles and captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from plotly.graph_objects import Figure

from fish_tuning.experiments.report.arm_runs import ArmRuns, percent
from fish_tuning.experiments.report.comparison import Comparison
from fish_tuning.experiments.report.figures.density import mask_densities
from fish_tuning.experiments.report.figures.mask_map import mask_map
from fish_tuning.experiments.report.figures.style import color_by_arm
from fish_tuning.experiments.report.figures.sweep import (
    metric_by_arm,
    score_distribution,
    trade_off,
    training_loss,
    validation_curve,
)
from fish_tuning.experiments.report.summary_table import metric_title
from fish_tuning.experiments.results import ScoreHistogram, TensorDensity


class Exhibit(NamedTuple):
    """A figure with its title and caption; the figure is None where there is nothing to draw.

    `arm` is the arm that the figure is about, if it is about a single one.
    """

    title: str
    caption: str
    figure: Figure | None
    arm: str | None = None


def exhibits(comparison: Comparison, highest_density: float) -> Iterator[Exhibit]:
    """Draw the figures of a sweep.

    Args:
        comparison: The sweep.
        highest_density: The end of the color scale that all masks share.
    """
    groups, metric = comparison.groups, comparison.metric
    title = metric_title(metric)
    colors = color_by_arm(group.arm for group in groups)
    if metric is not None:
        yield Exhibit(
            f"{title} by method",
            "One dot per seed, with a line at the mean if there are several.",
            metric_by_arm(groups, metric, colors),
        )
        yield Exhibit(
            f"{title} against trained parameters",
            "Means over the seeds, with their standard deviation. The dotted line is the Pareto "
            "front: no other arm is better with as few parameters.",
            trade_off(groups, metric, colors),
        )
    for suffix, part in _by_budget(groups):
        several = any(len(group.finished) > 1 for group in part)
        caption = "A thin line per seed, a thick one for their mean."
        caption = caption if several else "One seed."
        yield Exhibit(f"Training loss{suffix}", caption, training_loss(part, colors))
        if metric is not None:
            heading = f"Validation {title} while training{suffix}"
            yield Exhibit(heading, caption, validation_curve(part, metric, colors))
    for group in groups:
        masks = [tensor for run in group.finished for tensor in run.mask_density]
        yield Exhibit(
            f"What {group.label} trains",
            _mask_caption(masks, len(group.finished)),
            mask_map(masks, highest_density),
            group.arm,
        )
    yield from _score_exhibits(groups)


def _mask_caption(masks: Sequence[TensorDensity], seeds: int) -> str:
    caption = "Fraction of the adapter's entries that the mask selects, by layer and module"
    caption += f", mean over {seeds} seeds" if seeds > 1 else ""
    _, heads = mask_densities(masks)
    in_full = f" Trained in full: {', '.join(heads)}." if heads else ""
    return f"{caption}. All masks share one color scale.{in_full}"


def _score_exhibits(groups: Sequence[ArmRuns]) -> Iterator[Exhibit]:
    """One figure for all arms and budgets that select by the same scores."""
    seen: list[list[list[ScoreHistogram]]] = []
    for group in groups:
        histograms = [run.score_histograms for run in group.finished]
        if histograms not in seen:
            seen.append(histograms)
            yield Exhibit(
                f"Fisher scores of {group.label}",
                "Entries by score on a logarithmic axis, one line per seed.",
                score_distribution(group),
                group.arm,
            )


def _by_budget(groups: Sequence[ArmRuns]) -> list[tuple[str, Sequence[ArmRuns]]]:
    """Split the groups by budget; those without one are in every part."""
    ratios = list(dict.fromkeys(group.ratio for group in groups if group.ratio is not None))
    if len(ratios) < 2:
        return [("", groups)]
    return [
        (f" at {percent(ratio)}", [group for group in groups if group.ratio in (None, ratio)])
        for ratio in ratios
    ]
