"""The search for learning rates: an arm is compared at its own best one, not at another's."""

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
    """The learning rate of each arm and budget that did best on the held-out examples.

    Values are compared by their mean over the seeds; where these are equal the lower loss decides,
    then the lower learning rate. A value of which a run failed or diverged is not chosen.

    Args:
        runs: The runs of the search.
        metric: Name among their metrics.
        greater_is_better: Of that metric.

    Returns:
        Name and ratio to learning rate; an arm with no value to choose is left out.
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
    """Not finite where a run failed or has no such value."""
    return math.fsum(run.metrics.get(metric, math.nan) for run in runs) / len(runs)
