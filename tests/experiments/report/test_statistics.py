"""Spread and paired differences against numpy and against every resample written out."""

import itertools
import math
import warnings

import numpy as np
import pytest

from fish_tuning.experiments.report.statistics import (
    paired_difference,
    pooled_difference,
    spread,
)


@pytest.mark.parametrize("values", [[0.5, 0.7], [0.796, 0.781, 0.799], [1e-9, 1.0, 3.0, -4.0]])
def test_spread_is_mean_and_sample_deviation(values):
    """Guards n - 1 in the deviation: numpy's default divides by n."""
    found = spread(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.std == pytest.approx(np.std(values, ddof=1))
    assert found.count == len(values)


def test_spread_of_one_value_none_and_equal_ones():
    """Guards against nan for one seed, a crash without any, and a deviation made by rounding."""
    assert spread([0.7]).std is None
    assert spread([]) is None
    assert spread([0.1] * 3).std == 0
    assert spread([0.1] * 3).mean == 0.1


def test_difference_pairs_by_seed():
    """Guards against a difference of means over unlike seeds, and pairing by position."""
    found = paired_difference({3: 0.9, 1: 0.5, 7: 0.1}, {1: 0.4, 2: 0.0, 3: 0.6})
    assert found.seeds == (1, 3)
    assert found.mean == pytest.approx((0.1 + 0.3) / 2)


def test_interval_is_that_of_all_resamples():
    """Guards level and kind of the interval: quantiles of the means of all 5^5 resamples."""
    differences = [0.010, -0.004, 0.021, 0.007, 0.015]
    means = [np.mean(sample) for sample in itertools.product(differences, repeat=5)]
    found = paired_difference(dict(enumerate(differences)), dict.fromkeys(range(5), 0.0))
    assert found.interval == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=5e-4)


def test_interval_is_the_same_each_time_and_leaves_the_random_state_alone():
    """Guards against reports that differ from one writing to the next, and a sweep's seeding."""
    arm, baseline = {1: 0.5, 2: 0.8, 3: 0.6}, {1: 0.4, 2: 0.4, 3: 0.7}
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    first = paired_difference(arm, baseline)
    assert (np.random.get_state()[1] == before).all()
    assert paired_difference(arm, baseline) == first


def test_differences_without_an_interval_or_spread():
    """Guards against nan and warnings: one shared seed, none, and equal differences."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert paired_difference({1: 0.5, 2: 0.1}, {1: 0.25}).interval is None
        assert paired_difference({1: 0.5}, {2: 0.4}) is None
        same = paired_difference({1: 0.75, 2: 1.0, 3: 1.5}, {1: 0.5, 2: 0.75, 3: 1.25})
        assert same.mean == 0.25
        assert same.interval == (0.25, 0.25)
        nearly = paired_difference({1: 0.3, 2: 0.1}, {1: 0.2, 2: 0.0})
        assert all(map(math.isfinite, nearly.interval))


def test_pooled_interval_is_that_of_all_resamples_within_tasks():
    """Guards strata: quantiles over all ways to resample each task's seeds on its own."""
    tasks = {"a": [0.3, -0.1, 0.2], "b": [0.5, 0.4, 0.9]}
    arms = {task: dict(enumerate(values)) for task, values in tasks.items()}
    zeros = {task: dict.fromkeys(range(4), 0.0) for task in tasks}
    found = pooled_difference(arms, zeros)
    means = [
        (sum(a) / 3 + sum(b) / 3) / 2
        for a in itertools.product(tasks["a"], repeat=3)
        for b in itertools.product(tasks["b"], repeat=3)
    ]
    assert found.mean == pytest.approx((0.4 / 3 + 1.8 / 3) / 2)
    assert found.interval == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=5e-3)
    assert found.seeds == (0, 1, 2)


def test_tasks_count_the_same_whatever_their_seeds():
    """Guards the mean against a task with more runs, and a task that cannot be compared."""
    arms = {"a": {1: 1.0}, "b": {1: 0.0, 2: 0.0, 3: 0.0}}
    zeros = {"a": {1: 0.0}, "b": {1: 0.0, 2: 0.0, 3: 0.0}}
    found = pooled_difference(arms, zeros)
    assert found.mean == 0.5 and found.interval is None
    assert pooled_difference(arms, {"a": {1: 0.0}, "b": {9: 0.0}}) is None
    assert pooled_difference(arms, {"a": {1: 0.0}}) is None
    assert pooled_difference({}, {}) is None
