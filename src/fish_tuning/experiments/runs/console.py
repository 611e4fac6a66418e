"""What a sweep shows while it runs: one line per run, and nothing from other libraries."""

from __future__ import annotations

import contextlib
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


class ProgressLines:
    """One progress bar per run, or one line per finished run if stderr is not a terminal."""

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

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def begin(self, arm: Arm) -> Report:
        """Show that a run begins; call the returned function at each of its steps."""
        line = self._progress.add_task(arm.title, total=None, note="preparing")
        self._lines[arm.run_id] = line

        def report(step: int, total: int, loss: float | None) -> None:
            note = "" if loss is None else f"loss {loss:.4f}"
            self._progress.update(line, completed=step, total=total, note=note)

        return report

    def end(self, arm: Arm, run: Run) -> None:
        """Show how a run ended."""
        note = "failed"
        if run.status == "finished" and run.main_metric is not None:
            note = f"{run.main_metric} {run.metrics.get(run.main_metric, float('nan')):.4f}"
        line = self._lines[arm.run_id]
        self._progress.update(line, note=note)
        self._progress.stop_task(line)
        if self._progress.disable:
            self._progress.console.print(f"{arm.title}: {note}", highlight=False)


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
