"""Turns, spreads and peaks: what the figures of the suite rest on."""

import pytest
import torch

from benchmarks import measure
from benchmarks.measure import Rounds, Spread, peak_memory, take_turns


def test_contenders_take_turns():
    """Guards against a contender that always runs first, or warm-up that counts."""
    calls = []
    names = ["a", "b", "c"]
    rounds = take_turns({n: lambda n=n: calls.append(n) for n in names}, 3, "cpu", warmup=1)
    assert [len(rounds.seconds[name]) for name in names] == [3, 3, 3]
    in_order = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert in_order[1:] == ["abc", "bca", "cab"]
    assert sorted(in_order[0]) == names


def test_slow_contenders_take_fewer_turns(monkeypatch):
    """Guards against a suite that takes hours on a slow machine."""
    monkeypatch.setattr(measure, "LONGEST", 0.0)
    calls = []
    rounds = take_turns({n: lambda n=n: calls.append(n) for n in "ab"}, 9, "cpu", warmup=1)
    assert [len(rounds.seconds[name]) for name in "ab"] == [measure.FEWEST] * 2
    assert len(calls) == 2 * (1 + measure.FEWEST)


def test_ratios_pair_the_rounds():
    """Guards against a ratio of medians, which a machine that slows down would spoil."""
    rounds = Rounds({"a": [1.0, 2.0, 30.0], "b": [2.0, 4.0, 60.0]})
    assert rounds.ratios("a", "b") == [0.5, 0.5, 0.5]
    assert rounds.median("a") == 2.0


def test_spread():
    """Guards against quantiles in the wrong order."""
    spread = Spread.of([float(i) for i in range(11)])
    assert (spread.low, spread.median, spread.high) == pytest.approx((1.0, 5.0, 9.0))


def test_peak_memory_is_exact():
    """Guards against a peak that misses what was freed again, or counts what was there before."""
    before = torch.ones(500, 1000)

    def run():
        first = before * 2
        second = first + 1
        del first
        third = second * 2
        del second
        return third.sum()

    megabytes = 500 * 1000 * 4
    assert 2 * megabytes <= peak_memory(run, "cpu") < 2 * megabytes + 1000
