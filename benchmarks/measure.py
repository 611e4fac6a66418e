"""Seconds and bytes: contenders that take turns, and exact peaks of tensor memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

LONGEST, FEWEST = 45.0, 3
"""After so many seconds, contenders take no further turns, once they have had so many."""

LOW, HIGH = 0.1, 0.9
"""The spread of a figure: these quantiles over the rounds."""


@dataclass(frozen=True)
class Spread:
    """A median over rounds, and the quantiles LOW and HIGH around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The spread of a figure's values, one per round; a single value is exact."""
        low, median, high = (float(q) for q in np.quantile(values, (LOW, 0.5, HIGH)))
        return cls(median, low, high)


@dataclass(frozen=True)
class Rounds:
    """Seconds of each contender, one value per round."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        """The median of a contender, in seconds."""
        return Spread.of(self.seconds[name]).median

    def ratios(self, name: str, other: str) -> list[float]:
        """Time of one contender over another's in the same round.

        Whatever else the machine was doing affected both, so it cancels; in a ratio of medians it
        would not.
        """
        pairs = zip(self.seconds[name], self.seconds[other], strict=True)
        return [mine / theirs for mine, theirs in pairs]


def synchronize(device: str) -> None:
    """Waits until the device has finished its work."""
    if device != "cpu":
        torch.accelerator.synchronize()


def take_turns(
    contenders: Mapping[str, Callable[[], object]], rounds: int, device: str, warmup: int = 1
) -> Rounds:
    """Times contenders in turn, round after round, each round starting with another one.

    Args:
        contenders: What to time, by name.
        rounds: How many measured rounds to run; fewer if they take longer than LONGEST.
        device: Where they run.
        warmup: How many rounds to run before those, not measured.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    began = time.perf_counter()
    for number in range(-warmup, rounds):
        if number >= FEWEST and time.perf_counter() - began > LONGEST:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            synchronize(device)
            start = time.perf_counter()
            contenders[name]()
            synchronize(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return Rounds(seconds)


def peak_memory(run: Callable[[], object], device: str) -> int:
    """Bytes of tensors at the highest point of a run, beyond those that were there before.

    Exact on both kinds of device: an accelerator's allocator keeps the peak, and on the processor
    the profiler records every allocation. The resident memory of the process would be a blur.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    # There is no public access: key_averages() has sums, but no peak.
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(sizes).max(initial=0))
