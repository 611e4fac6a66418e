"""Statistics over the seeds of an arm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fish_tuning.experiments.results import Run

CONFIDENCE = 0.95
RESAMPLES = 9999


@dataclass(frozen=True)
class Group:
    """The runs of one arm at one budget, one for each seed."""

    arm: str
    ratio: float | None
    label: str
    runs: tuple[Run, ...]

    @property
    def finished(self) -> tuple[Run, ...]:
        """The runs that did not fail."""
        return tuple(run for run in self.runs if run.status == "finished")

    def by_seed(self, metric: str) -> dict[int, float]:
        """A metric of each finished run that has it."""
        return {
            run.seed: run.metrics[metric]
            for run in self.finished
            if math.isfinite(run.metrics.get(metric, math.nan))
        }


def group_runs(runs: Iterable[Run]) -> list[Group]:
    """Group runs by arm and budget, in the order of their first runs.

    The budget is part of a group's label where there are several.
    """
    groups: dict[tuple[str, float | None], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.arm, run.ratio), []).append(run)
    several = len({ratio for _, ratio in groups if ratio is not None}) > 1
    return [
        Group(
            arm,
            ratio,
            f"{arm} ({percent(ratio)})" if several and ratio is not None else arm,
            tuple(members),
        )
        for (arm, ratio), members in groups.items()
    ]


def baseline_of(group: Group, groups: Sequence[Group], arm: str) -> Group | None:
    """Return what a group is compared with: `arm` at the same budget, else without one."""
    candidates = [other for other in groups if other.arm == arm]
    for ratio in (group.ratio, None, 1.0):
        for other in candidates:
            if other.ratio == ratio:
                return other
    return None


def percent(ratio: float) -> str:
    """A fraction as readers know it: 0.25 is 25%."""
    return f"{100 * ratio:g}%"


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation; one value has no deviation."""

    mean: float
    std: float | None
    count: int


def spread(values: Iterable[float]) -> Spread | None:
    r"""Return mean and sample standard deviation, None without values.

    $s = \sqrt{\frac{1}{n - 1} \sum_i (x_i - \bar x)^2}$
    """
    values = list(values)
    if not values:
        return None
    # The mean of equal values is that value: rounding must not make a deviation of it.
    if min(values) == max(values):
        return Spread(values[0], 0.0 if len(values) > 1 else None, len(values))
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Spread(mean, math.sqrt(variance), len(values))


@dataclass(frozen=True)
class Difference:
    """Mean difference to the baseline over the seeds that both have.

    `interval` is None where there is one seed: a spread cannot be told from it.
    """

    mean: float
    interval: tuple[float, float] | None
    seeds: tuple[int, ...]


def paired_difference(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Compare an arm with the baseline seed by seed.

    The interval is the 95% percentile bootstrap interval of the mean over resampled seeds. It is
    seeded, so the same values give the same interval. With a handful of seeds it is too narrow
    rather than too wide: no resample can reach beyond the differences that were seen.

    Args:
        arm: Metric by seed.
        baseline: The same of the baseline.

    Returns:
        The difference, None where they share no seed.
    """
    return pooled_difference({"": arm}, {"": baseline})


def pooled_difference(
    arms: Mapping[str, Mapping[int, float]], baselines: Mapping[str, Mapping[int, float]]
) -> Difference | None:
    """Compare an arm with the baseline over several tasks, each counting the same.

    The mean over tasks of the mean over seeds of paired differences. The interval resamples the
    seeds within each task: it says how sure the mean over *these* tasks is, not over others.

    Args:
        arms: Metric by seed, by task.
        baselines: The same of the baseline.

    Returns:
        The difference; its `seeds` are those of all tasks together. None where there is a task
        in which they share no seed.
    """
    differences = []
    seeds: set[int] = set()
    for task, arm in arms.items():
        baseline = baselines.get(task, {})
        shared = sorted(arm.keys() & baseline.keys())
        if not shared:
            return None
        differences.append([arm[seed] - baseline[seed] for seed in shared])
        seeds.update(shared)
    if not differences:
        return None
    spreads = [spread(values) for values in differences]
    mean = math.fsum(s.mean for s in spreads if s) / len(spreads)
    interval = None
    if all(len(values) > 1 for values in differences):
        constant = all(s.std == 0 for s in spreads if s)
        interval = (mean, mean) if constant else _interval(differences)
    return Difference(mean, interval, tuple(sorted(seeds)))


def _interval(strata: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of the strata's means, resampled within each."""
    import numpy as np
    from scipy.stats import bootstrap

    def mean_of_means(*samples: Any, axis: int = -1) -> Any:
        return np.mean([sample.mean(axis=axis) for sample in samples], axis=0)

    interval = bootstrap(
        [np.asarray(values) for values in strata],
        mean_of_means,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)
