"""Experiment trackers: one tracked run per run of a sweep, named, grouped, and closed at its end.

transformers' own callbacks log what happens while a run trains. Left alone, they would log all runs
of a process to the same tracked run, and write TensorBoard's files to a folder that is deleted when
a run ends. So the tracked run is opened and named before they look for one, and at the end it gets
a summary.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fish_tuning.atomic import write_atomically
from fish_tuning.experiments.arms import Arm
from fish_tuning.experiments.config.surroundings import trackers_of
from fish_tuning.experiments.errors import ConfigError, first_line
from fish_tuning.experiments.results import Run
from fish_tuning.experiments.runs import processes
from fish_tuning.experiments.runs.arguments import PROJECT
from fish_tuning.experiments.runs.prepare import PreparedExperiment
from fish_tuning.experiments.runs.record import CHECKPOINTS_FOLDER
from fish_tuning.experiments.runs.tracking.summary import summary_of

logger = logging.getLogger(__name__)

TENSORBOARD_FOLDER = "tensorboard"
_WANDB_ID = "wandb_run_id.txt"


class TrackerError(ConfigError):
    """A tracker cannot be opened, so no run of the sweep can be tracked."""


Summarize = Callable[[dict[str, float]], None]
"""Adds numbers by name to a tracked run."""


@contextmanager
def tracked(
    arm: Arm, experiment: PreparedExperiment, folder: Path
) -> Iterator[Callable[[Run], None]]:
    """Track one run with wandb, trackio and TensorBoard; other trackers are left to transformers.

    Args:
        arm: The arm; its title, with the seed in it, is the tracked run's name.
        experiment: The experiment, whose name groups its runs.
        folder: The run's own folder. TensorBoard's files go to `tensorboard` in the experiment's
            folder, unless `TENSORBOARD_LOGGING_DIR` is set.

    Yields:
        A function that adds a summary of the run's record.

    Raises:
        TrackerError: A tracker cannot be opened; without an account, for example.
    """
    trackers = trackers_of(experiment.config) if processes.is_main() else []
    with ExitStack() as stack:
        summaries = []
        for name in trackers:
            try:
                if name in _TRACKERS:
                    opened = _TRACKERS[name](arm, experiment, folder)
                    summaries.append(stack.enter_context(opened))
            # Trackers have errors of their own, without a common base class.
            except Exception as error:
                where = experiment.config.argument_path("report_to")
                raise TrackerError(
                    f"{where}: {name} cannot be opened ({first_line(error)}); set it up, or set "
                    "report_to: none"
                ) from error

        def summarize(run: Run) -> None:
            for add in summaries:
                try:
                    add(summary_of(run))
                # A run that has been trained is not lost for want of its summary elsewhere.
                except Exception as error:
                    logger.warning("no summary of %s was tracked: %s", run.run_id, error)

        yield summarize


@contextmanager
def _wandb(arm: Arm, experiment: PreparedExperiment, folder: Path) -> Iterator[Summarize]:
    import wandb

    # An interrupted run goes on in the tracked run that it has begun.
    begun = folder / _WANDB_ID
    known = begun.read_text(encoding="utf-8") if begun.is_file() else None
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", _project(experiment)),
        group=experiment.name,
        name=arm.title,
        job_type="run" if arm.held_out is None else "search",
        config=_settings(arm),
        id=known,
        resume=None if known is None else "allow",
    )
    write_atomically(begun, run.id.encode())
    failed = True
    try:
        yield run.summary.update
        failed = False
        begun.unlink(missing_ok=True)
    finally:
        run.finish(exit_code=int(failed))


@contextmanager
def _trackio(arm: Arm, experiment: PreparedExperiment, folder: Path) -> Iterator[Summarize]:
    import trackio

    # transformers' callback opens the run, before training and for the last evaluation again. It
    # names no group, and would go on in any earlier run of the same name.
    init = trackio.init
    own = [(folder / CHECKPOINTS_FOLDER).exists()]  # whether the last run of that name is this one

    def init_in_group(**arguments: Any) -> Any:
        arguments |= {"group": experiment.name, "resume": "allow" if own[0] else "never"}
        own[0] = True
        return init(**arguments)

    def summarize(summary: dict[str, float]) -> None:
        if trackio.context_vars.current_run.get() is None:
            trackio.init(project=_project(experiment), name=arm.title)
        trackio.config.update(_settings(arm))
        trackio.log(summary)

    trackio.init = init_in_group
    try:
        yield summarize
    finally:
        trackio.init = init
        if trackio.context_vars.current_run.get() is not None:
            trackio.finish()


@contextmanager
def _tensorboard(arm: Arm, experiment: PreparedExperiment, folder: Path) -> Iterator[Summarize]:
    from transformers.integrations.integration_utils import TensorBoardCallback

    given = os.environ.get("TENSORBOARD_LOGGING_DIR")
    home = Path(given).expanduser() if given else folder.parents[1] / TENSORBOARD_FOLDER
    # TensorBoard calls a run by the path of its folder.
    logs = str(home / re.sub(r"[^\w. -]", "-", experiment.name) / arm.run_id)
    os.environ["TENSORBOARD_LOGGING_DIR"] = logs

    def summarize(summary: dict[str, float]) -> None:
        callback: Any = TensorBoardCallback
        writer = callback()._SummaryWriter(log_dir=logs)
        for name, value in summary.items():
            writer.add_scalar(name.replace(" ", "_"), value)
        writer.close()

    try:
        yield summarize
    finally:
        if given is None:
            del os.environ["TENSORBOARD_LOGGING_DIR"]
        else:
            os.environ["TENSORBOARD_LOGGING_DIR"] = given


def _project(experiment: PreparedExperiment) -> str:
    return str(experiment.config.training_args.get("project", PROJECT))


def _settings(arm: Arm) -> dict[str, Any]:
    return {"arm": arm.name, "budget_ratio": arm.ratio, "run_seed": arm.seed, "run_id": arm.run_id}


_TRACKERS = {"wandb": _wandb, "trackio": _trackio, "tensorboard": _tensorboard}
