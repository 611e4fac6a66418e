"""Carries out runs as tasks of Ray: on a cluster that is running, or on this machine."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from fish_tuning.experiments.arms import Arm
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.results import Run
from fish_tuning.experiments.runs.console import quiet
from fish_tuning.experiments.runs.executors.local import Begin, Executor, carry_out
from fish_tuning.experiments.runs.prepare import PreparedExperiment
from fish_tuning.experiments.runs.record import failed_run, now, run_folder, write_record

logger = logging.getLogger(__name__)


@contextmanager
def over_ray(cpus_per_run: int) -> Iterator[Executor]:
    """An executor whose runs are tasks of Ray, as many at a time as cores and GPUs allow.

    Each run takes one GPU if the cluster has any, unless the config says `use_cpu`. Every machine
    must find the same files at the same paths: the output folder, local models and data, and the
    hub's cache. Leaving the context ends all runs that are not finished.

    Args:
        cpus_per_run: Number of cores, and of torch's threads, per run.

    Raises:
        ConfigError: No machine of the cluster has that many cores.
        ConnectionError: Ray does not start here, or the cluster does not answer.
    """
    # Ray sends usage statistics unless told otherwise; only the user may turn that on.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        # It raises many kinds of errors, a bare Exception if its processes start too slowly.
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
        # The output folder's lock may be released only once no task writes to it.
        if pending:
            ray.wait(list(pending), num_returns=len(pending))
        if ours:
            ray.shutdown()


def _spread(
    pending: dict[Any, Arm],
    cpus: int,
    arms: Sequence[Arm],
    experiment: PreparedExperiment,
    output_dir: Path,
    begin: Begin,
) -> Iterator[tuple[Arm, Run]]:
    use_cpu = experiment.config.training_args.get("use_cpu")
    gpus = int(bool(ray.cluster_resources().get("GPU", 0)) and not use_cpu)
    # No retries: a lost process may still be writing to the folder that a retry would use.
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(_carry_out)
    shared, here, started = ray.put(experiment), os.getcwd(), now()
    for arm in arms:
        begin(arm)
        pending[remote.remote(arm, shared, run_folder(output_dir, arm), here, cpus)] = arm
    while pending:
        [done], _ = ray.wait(list(pending))
        arm = pending.pop(done)
        try:
            run = ray.get(done)
        except RayTaskError as error:
            # Failures of runs are recorded in the task. Any other error ends the sweep.
            raise error.cause from None
        except RayError as error:
            logger.error("%s was lost: %s", arm.run_id, error)
            run = failed_run(arm, experiment, error, started)
            write_record(run, run_folder(output_dir, arm))
        yield arm, run


def _carry_out(arm: Arm, experiment: PreparedExperiment, folder: Path, here: str, cpus: int) -> Run:
    os.chdir(here)  # Relative paths in the config start there.
    torch.set_num_threads(cpus)
    with quiet():
        return carry_out(arm, experiment, folder, lambda step, total, loss: None)
