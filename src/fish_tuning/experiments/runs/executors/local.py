"""Carries out runs one after another in this process."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from fish_tuning.experiments.arms import Arm
from fish_tuning.experiments.results import Run
from fish_tuning.experiments.runs import processes, training
from fish_tuning.experiments.runs.measurements import Report
from fish_tuning.experiments.runs.prepare import PreparedExperiment
from fish_tuning.experiments.runs.record import failed_run, now, run_folder, write_record
from fish_tuning.experiments.runs.tracking.trackers import TrackerError, tracked

logger = logging.getLogger(__name__)

Begin = Callable[[Arm], Report]
"""Called when a run begins; returns the function to call at each of its steps."""

Executor = Callable[[Sequence[Arm], PreparedExperiment, Path, Begin], Iterator[tuple[Arm, Run]]]
"""Carries out the runs of some arms in an output folder, and yields each run when it ends."""


def in_turn(
    arms: Sequence[Arm], experiment: PreparedExperiment, output_dir: Path, begin: Begin
) -> Iterator[tuple[Arm, Run]]:
    """The default executor: one run after another, in this process."""
    for arm in arms:
        yield arm, carry_out(arm, experiment, run_folder(output_dir, arm), begin(arm))


def carry_out(arm: Arm, experiment: PreparedExperiment, folder: Path, report: Report) -> Run:
    """Carry out one run and write its record, whether it succeeds or fails.

    Args:
        arm: The arm.
        experiment: The experiment.
        folder: The run's own folder.
        report: Called at every step.

    Returns:
        The record.

    Raises:
        OSError: The record cannot be written.
        TrackerError: A tracker cannot be opened, which would fail every run.
    """
    started = now()
    error = None
    try:
        with tracked(arm, experiment, folder) as summarize:
            run = training.run_arm(arm, experiment, folder, report)
            summarize(run)
    # Whatever goes wrong in one run, the others still have to run.
    except Exception as caught:
        error = caught
        logger.debug("%s failed", arm.title, exc_info=True)
    if isinstance(error := processes.agree_on(error), TrackerError):
        raise error
    if error is not None:
        logger.error("%s failed: %s: %s", arm.title, type(error).__name__, error)
        run = failed_run(arm, experiment, error, started)
    if processes.is_main():
        write_record(run, folder)
    del error  # Its traceback keeps the run's model alive.
    _free_memory()
    return run


def _free_memory() -> None:
    """Free the last run's memory, so that every run starts with the same amount."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
