"""Which figures a sweep's report shows, with titles and captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from fish_tuning.experiments.report.arm_runs import ArmRuns, percent
from fish_tuning.experiments.report.comparison import Comparison
from fish_tuning.experiments.report.density_figure import density_figure
from fish_tuning.experiments.report.figures import (
    metric_by_arm,
    score_distribution,
    trade_off,
    training_loss,
    validation_curve,
)
from fish_tuning.experiments.report.summary_table import metric_title
from fish_tuning.experiments.results import ScoreHistogram


class Exhibit(NamedTuple):
    """A figure with its title and caption; the figure is None where there is nothing to draw."""

    title: str
    caption: str
    figure: Figure | None


def exhibits(comparison: Comparison) -> Iterator[Exhibit]:
    """Draw the figures of a sweep."""
    groups, metric = comparison.groups, comparison.metric
    title = metric_title(metric)
    if metric is not None:
        yield Exhibit(
            f"{title} by method",
            "One dot per seed, with a line at the mean if there are several.",
            metric_by_arm(groups, metric),
        )
        yield Exhibit(
            f"{title} against trainable parameters",
            "One dot per seed, with a line through the means.",
            trade_off(groups, metric),
        )
    for suffix, part in _by_budget(groups):
        several = any(len(group.finished) > 1 for group in part)
        caption = "A thin line per seed, a thick one for their mean."
        caption = caption if several else "One seed."
        yield Exhibit(f"Training loss{suffix}", caption, training_loss(part))
        if metric is not None:
            heading = f"Validation {title} while training{suffix}"
            yield Exhibit(heading, caption, validation_curve(part, metric))
    for group in groups:
        seeds = len(group.finished)
        yield Exhibit(
            f"What {group.label} trains",
            "Fraction of the adapter's entries that the mask selects, by layer and module"
            f"{f', mean over {seeds} seeds' if seeds > 1 else ''}.",
            density_figure(tensor for run in group.finished for tensor in run.mask_density),
        )
    yield from _score_exhibits(groups)


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
