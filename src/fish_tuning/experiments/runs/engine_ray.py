"""The runs of a sweep spread over a Ray cluster: one that is running, or this machine."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from fish_tuning.experiments.arms import Arm
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.results import Run
from fish_tuning.experiments.runs import training
from fish_tuning.experiments.runs.measurements import Report
from fish_tuning.experiments.runs.run import Engine, carry_out, quiet, record, run_folder

logger = logging.getLogger(__name__)


@contextmanager
def over_ray(cpus_per_run: int) -> Iterator[Engine]:
    """An engine whose runs are tasks of Ray, as many at a time as there are cores and GPUs for.

    Each run takes one GPU where the cluster has any, unless the config says `use_cpu`. Every
    machine has to find the same files at the same paths: output folder, local models and data, and
    the hub's cache. When the context ends, runs that are not finished are ended too.

    Args:
        cpus_per_run: Cores, and threads of torch, of each run.

    Raises:
        ConfigError: No machine of the cluster has as many cores.
        ConnectionError: Ray does not start here, or the cluster does not answer.
    """
    # What is trained here is reported to nobody unless the user has said so.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        # It raises whatever it comes upon, a bare Exception where its processes start too slowly.
        except Exception as error:
            raise ConnectionError(f"Ray does not start or answer: {error}") from error
    pending: dict[Any, Arm] = {}
    try:
        cores = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
        if cpus_per_run > cores:
            raise ConfigError(
                f"cpus_per_run: {cpus_per_run} is more than the {cores} cores of Ray's largest "
                "machine, so no run would ever begin; choose fewer"
            )
        yield functools.partial(_spread, pending, cpus_per_run)
    finally:
        for task in pending:
            ray.cancel(task, force=True)
        # The lock on the folder is given back when nobody writes there any more.
        ray.wait(list(pending), num_returns=len(pending)) if pending else None
        if ours:
            ray.shutdown()


def _spread(
    pending: dict[Any, Arm],
    cpus: int,
    arms: Sequence[Arm],
    task: training.Task,
    output_dir: Path,
    begin: Callable[[Arm], Report],
) -> Iterator[tuple[Arm, Run]]:
    on_gpus = ray.cluster_resources().get("GPU", 0) and not task.config.training_args.get("use_cpu")
    # Not tried again by Ray: a process that was lost may still write where the next one would.
    remote = ray.remote(num_cpus=cpus, num_gpus=int(bool(on_gpus)), max_retries=0)(_carry_out)
    shared, here = ray.put(task), os.getcwd()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    for arm in arms:
        begin(arm)
        pending[remote.remote(arm, shared, run_folder(output_dir, arm), here, cpus)] = arm
    while pending:
        [done], _ = ray.wait(list(pending))
        arm = pending.pop(done)
        try:
            run = ray.get(done)
        except RayTaskError as error:
            # A run's own failure has been recorded; what is left ends a sweep without Ray too.
            raise error.cause from None
        except RayError as error:
            logger.error("%s was lost: %s", arm.run_id, error)
            run = training.failed_run(arm, task, error, started)
            record(run, run_folder(output_dir, arm))
        yield arm, run


def _carry_out(arm: Arm, task: training.Task, folder: Path, here: str, cpus: int) -> Run:
    os.chdir(here)  # Relative paths of the config start there.
    torch.set_num_threads(cpus)
    with quiet():
        return carry_out(arm, task, folder, _unseen)


def _unseen(step: int, total: int, loss: float | None) -> None:
    pass
