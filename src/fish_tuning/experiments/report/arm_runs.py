"""The runs of a sweep, grouped by arm and budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fish_tuning.experiments.results import Run


@dataclass(frozen=True)
class ArmRuns:
    """The runs of one arm at one budget, one per seed.

    Attributes:
        arm: Name of the arm.
        ratio: Its budget as a fraction of the baseline; None for an arm without a budget.
        label: What reports call it: the arm, and the budget where the sweep has several.
        runs: All its runs, failed ones included.
    """

    arm: str
    ratio: float | None
    label: str
    runs: tuple[Run, ...]

    @property
    def finished(self) -> tuple[Run, ...]:
        """The runs that did not fail."""
        return tuple(run for run in self.runs if run.status == "finished")

    def by_seed(self, metric: str | None) -> dict[int, float]:
        """Return a metric by seed, for the finished runs where it is a finite number."""
        return {
            run.seed: run.metrics[metric]
            for run in self.finished
            if metric is not None and math.isfinite(run.metrics.get(metric, math.nan))
        }


def group_runs(runs: Iterable[Run]) -> list[ArmRuns]:
    """Group runs by arm and budget, in the order of each group's first run."""
    groups: dict[tuple[str, float | None], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.arm, run.ratio), []).append(run)
    several = len({ratio for _, ratio in groups if ratio is not None}) > 1
    return [
        ArmRuns(
            arm,
            ratio,
            f"{arm} ({percent(ratio)})" if several and ratio is not None else arm,
            tuple(members),
        )
        for (arm, ratio), members in groups.items()
    ]


def baseline_of(runs: ArmRuns, others: Sequence[ArmRuns], arm: str) -> ArmRuns | None:
    """Find the baseline of a group of runs.

    Args:
        runs: The group to compare.
        others: All groups of the sweep.
        arm: Name of the baseline's arm.

    Returns:
        The group of `arm` at the same budget, else the one without a budget, else the one at
        100%; None if there is none of these.
    """
    by_ratio = {other.ratio: other for other in reversed(others) if other.arm == arm}
    return next((by_ratio[r] for r in (runs.ratio, None, 1.0) if r in by_ratio), None)


def percent(ratio: float) -> str:
    """Write a fraction as a percentage: 0.25 is 25%."""
    return f"{100 * ratio:g}%"
