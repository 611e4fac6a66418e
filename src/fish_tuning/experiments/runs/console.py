"""What a sweep shows while it runs: one line per run, and nothing from other libraries."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from typing import Any, Self

import datasets
import transformers
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from fish_tuning.experiments.arms import Arm
from fish_tuning.experiments.results import Run
from fish_tuning.experiments.runs import processes
from fish_tuning.experiments.runs.measurements import Report

_SECONDS_BETWEEN_LINES = 30.0


class ProgressLines:
    """One progress bar per run; if stderr is not a terminal, a line now and then.

    Both show the time left: of a run while it trains, and of the sweep when a run ends.
    """

    def __init__(self) -> None:
        console = Console(stderr=True, quiet=not processes.is_main())
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not (console.is_terminal and processes.is_main()),
        )
        self._lines: dict[str, TaskID] = {}
        self._expected = self._ended = 0
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def expect(self, runs: int, finished: int) -> None:
        """Show how many runs are finished already, of those that follow and these.

        The time left is estimated from those that end from now on.
        """
        self._expected, self._ended, self._began = runs, 0, time.monotonic()
        if finished:
            kept = f"{finished} of {runs + finished} runs are finished already"
            self._progress.console.print(kept, highlight=False, soft_wrap=True)

    def begin(self, arm: Arm) -> Report:
        """Show that a run begins; call the returned function at each of its steps."""
        line = self._progress.add_task(arm.title, total=None, note="preparing")
        self._lines[arm.run_id] = line
        steps: list[tuple[float, int]] = []  # when a step ended, and which one: first and last

        def report(step: int, total: int, loss: float | None) -> None:
            note = "" if loss is None else f"loss {loss:.4f}"
            self._progress.update(line, completed=step, total=total, note=note)
            now = time.monotonic()
            if not steps:
                steps.extend([(now, step)] * 2)
            elif now - steps[1][0] >= _SECONDS_BETWEEN_LINES and step < total:
                began, first = steps[0]
                steps[1] = (now, step)
                left = (now - began) / (step - first) * (total - step)
                note = f"{note}, " if note else ""
                self._print(f"{arm.title}: step {step} of {total}, {note}{_duration(left)} left")

        return report

    def end(self, arm: Arm, run: Run) -> None:
        """Show how a run ended."""
        note = "failed"
        if run.status == "finished" and run.main_metric is not None:
            note = f"{run.main_metric} {run.metrics.get(run.main_metric, float('nan')):.4f}"
        line = self._lines[arm.run_id]
        self._progress.update(line, note=note)
        self._progress.stop_task(line)
        self._ended += 1
        left = self._expected - self._ended
        if left > 0:
            seconds = (time.monotonic() - self._began) / self._ended * left
            note += f" ({left} more run{'s' * (left > 1)}, about {_duration(seconds)} left)"
            self._progress.update(line, note=note)
        self._print(f"{arm.title}: {note}")

    def _print(self, text: str) -> None:
        """Print a line where there are no bars."""
        if self._progress.disable:
            self._progress.console.print(text, highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence notices and progress bars of other libraries; their errors still show."""
    # Their functions have no type annotations.
    loggings: list[Any] = [transformers.logging, datasets.logging]
    verbosities = [library.get_verbosity() for library in loggings]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|accelerate|datasets)\b")
        try:
            for library in loggings:
                library.set_verbosity_error()
                library.disable_progress_bar()
            yield
        finally:
            for library, verbosity in zip(loggings, verbosities, strict=True):
                library.set_verbosity(verbosity)
                library.enable_progress_bar()
