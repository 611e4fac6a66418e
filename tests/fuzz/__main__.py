"""Fuzzes every reader for a share of the time: `python -m tests.fuzz [SECONDS]`."""

import logging
import sys
import time
import traceback

from hypothesis import HealthCheck, Phase, given, seed, settings

from .readers import FUZZERS, Fuzzer

ROUND = 500
"""Inputs between two looks at the clock; each round has a seed of its own."""


def fuzz(fuzzer: Fuzzer, seconds: float) -> tuple[int, int, float]:
    """Tries inputs until time is up.

    Returns:
        Inputs tried, crashes (rounds that ended with one), and the seconds of the slowest input.
    """
    tried, crashes, slowest = 0, 0, 0.0

    def check(content: object) -> None:
        nonlocal tried, slowest
        tried += 1
        began = time.monotonic()
        fuzzer.check(content)
        slowest = max(slowest, time.monotonic() - began)

    end = time.monotonic() + seconds
    number = time.time_ns()
    while time.monotonic() < end:
        number += 1
        search = settings(
            max_examples=ROUND,
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )(seed(number)(given(fuzzer.inputs())(check)))
        try:
            search()
        except Exception:
            crashes += 1
            print(f"seed {number}:")
            traceback.print_exc(file=sys.stdout)
    return tried, crashes, slowest


def main(seconds: float) -> int:
    """Fuzzes, prints the outcome, and returns the number of crashes."""
    logging.disable()
    total = 0
    for name, fuzzer in FUZZERS.items():
        tried, crashes, slowest = fuzz(fuzzer, seconds / len(FUZZERS))
        print(f"{name}: {tried:,} inputs, {crashes} crashes, the slowest took {slowest:.2f} s")
        total += crashes
    return total


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else 600) > 0)
