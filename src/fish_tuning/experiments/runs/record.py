"""What runs leave on disk: each run's folder and record."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fish_tuning.experiments import environment
from fish_tuning.experiments.arms import Arm
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.metrics.names import metric_key
from fish_tuning.experiments.results import RUN_FILE, RUNS_FOLDER, Run, read_run, write_json
from fish_tuning.experiments.runs import processes
from fish_tuning.experiments.runs.prepare import PreparedExperiment

ADAPTER_FOLDER = "adapter"
CHECKPOINTS_FOLDER = "checkpoints"
SELECTION_FOLDER = "selection"


def run_folder(output_dir: Path, arm: Arm) -> Path:
    """The folder of one run."""
    return output_dir / RUNS_FOLDER / arm.run_id


def recorded_runs(arms: Iterable[Arm], output_dir: Path) -> list[Run]:
    """Read the records of those runs that have one, in the order of the arms."""
    runs = []
    for arm in arms:
        with contextlib.suppress(ConfigError):
            runs.append(read_run(run_folder(output_dir, arm) / RUN_FILE))
    return runs


def finished_ids(arms: Iterable[Arm], output_dir: Path) -> set[str]:
    """The ids of those runs that are finished."""
    runs = recorded_runs(arms, output_dir)
    return {run.run_id for run in runs if run.status == "finished"}


def write_record(run: Run, folder: Path) -> None:
    """Write a run's record, and delete what only an interrupted run needs."""
    write_json(folder / RUN_FILE, run)
    discard_temporary(folder)


def discard_temporary(folder: Path) -> None:
    """Delete what only an interrupted run needs."""
    for name in (CHECKPOINTS_FOLDER, SELECTION_FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)


def failed_run(arm: Arm, experiment: PreparedExperiment, error: Exception, started: str) -> Run:
    """The record of a run that failed."""
    reason = f"{type(error).__name__}: {error}"
    return run_record(arm, experiment, started, status="failed", error=reason)


def run_record(arm: Arm, experiment: PreparedExperiment, started: str, **outcome: Any) -> Run:
    """The record of a run that has just ended.

    Args:
        arm: The arm.
        experiment: The experiment.
        started: When the run started, from `now`.
        **outcome: The fields of the record that depend on how the run went.
    """
    counts = experiment.counts[arm.key]
    return Run(
        run_id=arm.run_id,
        arm=arm.name,
        ratio=arm.ratio,
        seed=arm.seed,
        learning_rate=arm.learning_rate,
        held_out=arm.held_out,
        config=experiment.config.model_dump(mode="json"),
        budget=counts.trainable,
        total_params=counts.total,
        main_metric=metric_key(experiment.data.metrics[0]),
        versions=environment.versions(),
        commit=experiment.commit,
        hardware=environment.hardware(processes.count()),
        started_at=started,
        finished_at=now(),
        **outcome,
    )


def now() -> str:
    """The time in UTC, to the second, in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
