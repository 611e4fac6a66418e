"""Means, deviations and paired differences over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CONFIDENCE = 0.95
RESAMPLES = 9999


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation; `std` is None for a single value."""

    mean: float
    std: float | None
    count: int


def spread(values: Iterable[float]) -> Spread | None:
    r"""Return mean and sample standard deviation, or None without values.

    $s = \sqrt{\frac{1}{n - 1} \sum_i (x_i - \bar x)^2}$
    """
    values = list(values)
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.mean(values), std, len(values))


@dataclass(frozen=True)
class Difference:
    """Mean difference to a baseline, over the seeds that both have.

    `interval` is None if there is only one seed.
    """

    mean: float
    interval: tuple[float, float] | None
    seeds: tuple[int, ...]


def paired_difference(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Compare an arm with the baseline seed by seed.

    The interval is the 95% percentile bootstrap interval of the mean over resampled seeds. The
    bootstrap is seeded, so the same values give the same interval. With a handful of seeds it is
    too narrow rather than too wide: no resample can lie outside the observed differences.

    Args:
        arm: Metric of the arm, by seed.
        baseline: Metric of the baseline, by seed.

    Returns:
        The difference, or None if they share no seed.
    """
    return pooled_difference({"": arm}, {"": baseline})


def pooled_difference(
    arms: Mapping[str, Mapping[int, float]], baselines: Mapping[str, Mapping[int, float]]
) -> Difference | None:
    """Compare an arm with the baseline over several tasks, which all have the same weight.

    This is the mean over tasks of the mean over seeds of the paired differences. The interval
    resamples the seeds within each task, so it says how certain the mean over these tasks is, and
    nothing about other tasks.

    Args:
        arms: Metric of the arm by task, then by seed.
        baselines: Metric of the baseline by task, then by seed.

    Returns:
        The difference, with the seeds of all tasks together; None without tasks, or if a task has
        no seed in common.
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
    mean = statistics.fmean(s.mean for s in spreads if s)
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
