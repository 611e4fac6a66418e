"""The search for learning rates: every arm is compared at its own best rate."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

from fish_tuning.experiments.arms import ArmKey
from fish_tuning.experiments.results import Run

logger = logging.getLogger(__name__)

LOSS = "eval_loss"


def chosen_learning_rates(
    runs: Iterable[Run], metric: str, greater_is_better: bool
) -> dict[ArmKey, float]:
    """Choose the learning rate of each arm and budget that did best on the held-out examples.

    Rates are compared by the mean of the metric over the seeds, then by the lower mean loss, then
    by the lower rate. A rate is not chosen if one of its runs failed or diverged.

    Args:
        runs: The runs of the search.
        metric: Name of one of their metrics.
        greater_is_better: Whether greater values of the metric are better.

    Returns:
        Learning rate by name and ratio; arms without an eligible rate are left out.
    """
    tried: dict[ArmKey, dict[float, list[Run]]] = {}
    for run in runs:
        if run.learning_rate is not None:
            values = tried.setdefault((run.arm, run.ratio), {})
            values.setdefault(run.learning_rate, []).append(run)
    chosen = {}
    for key, values in tried.items():
        # Lowest is best.
        ranks = {}
        for value, members in values.items():
            means = [_mean(members, metric), _mean(members, LOSS)]
            if all(map(math.isfinite, means)):
                ranks[value] = (-means[0] if greater_is_better else means[0], means[1], value)
        if ranks:
            chosen[key] = min(ranks, key=ranks.__getitem__)
        else:
            logger.error("%s: no learning rate of the search gave a finite %s", key[0], metric)
    return chosen


def _mean(runs: list[Run], metric: str) -> float:
    """The mean over runs; not finite if one of them failed or lacks the metric."""
    return math.fsum(run.metrics.get(metric, math.nan) for run in runs) / len(runs)
