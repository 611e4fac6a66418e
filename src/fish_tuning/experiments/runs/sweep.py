"""A sweep: every run of an experiment, each recorded once, resumable at any moment."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fish_tuning.experiments.arms import Arm, ArmKey, planned, searched
from fish_tuning.experiments.config.lock import locked
from fish_tuning.experiments.config.schema import ExperimentConfig
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.metrics.names import metric_key
from fish_tuning.experiments.results import RESULTS_FILE, Results, write_json
from fish_tuning.experiments.runs import processes
from fish_tuning.experiments.runs.arguments import best_by
from fish_tuning.experiments.runs.console import ProgressLines, quiet
from fish_tuning.experiments.runs.executors.local import Executor, in_turn
from fish_tuning.experiments.runs.preflight import CheckedExperiment, check_experiment
from fish_tuning.experiments.runs.prepare import PreparedExperiment, prepare
from fish_tuning.experiments.runs.record import (
    discard_temporary,
    finished_ids,
    recorded_runs,
    run_folder,
)
from fish_tuning.experiments.runs.search import chosen_learning_rates


def run_experiment(config: ExperimentConfig, *, name: str, ray_cpus: int | None = None) -> Results:
    """Check an experiment and carry out all its runs that are not finished yet.

    Raises:
        ConfigError: See `check_experiment` and `run_checked`. Nothing has been written.
        KeyboardInterrupt: The sweep was interrupted. Another call continues it.
    """
    return run_checked(check_experiment(config), name=name, ray_cpus=ray_cpus)


def run_checked(checked: CheckedExperiment, *, name: str, ray_cpus: int | None = None) -> Results:
    """Carry out all runs of a checked experiment that are not finished yet.

    With a `learning_rate_search`, its runs come first: they choose each arm's learning rate.

    Each run's record is written once, when the run ends. `results.json` holds the records in the
    order of the plan and is rewritten after each run. Another call after any kind of interruption
    skips the finished runs, resumes the interrupted one from its last intact checkpoint, and tries
    the failed ones again.

    If a launcher started several processes, every process makes this call: they train each run
    together, and the main process writes. A run that fails in all processes is recorded, and the
    sweep goes on; a run that fails in only some of them ends the program.

    Args:
        checked: The experiment.
        name: Its name in the results.
        ray_cpus: Number of cores per run, to train several runs at a time as tasks of Ray (see
            `executor_ray`). None trains one run after another in this process.

    Returns:
        The records of all runs.

    Raises:
        ConfigError: Something in the config, the model or the data is wrong, another sweep is
            running in the same folder, the folder's runs used another number of processes, or no
            machine has `ray_cpus` cores. Nothing has been written.
        KeyboardInterrupt: The sweep was interrupted. Another call continues it.
    """
    with quiet(), contextlib.ExitStack() as stack:
        experiment = prepare(checked, name=name)
        folder = Path(experiment.config.training.output_dir)
        processes.in_main(lambda: _check_processes(experiment.config, folder))
        processes.in_main(lambda: stack.enter_context(locked(folder)))
        executor = stack.enter_context(_executor(ray_cpus))
        progress = stack.enter_context(ProgressLines())
        return _Sweep(experiment, name, folder, executor, progress).run()


@dataclass(frozen=True)
class _Sweep:
    experiment: PreparedExperiment
    name: str
    folder: Path
    executor: Executor
    progress: ProgressLines

    def run(self) -> Results:
        """Carry out the runs of the search, if there is one, and then those of the plan."""
        config = self.experiment.config
        if config.learning_rate_search is not None:
            held_out = config.learning_rate_search.held_out
            self._carry_out(searched(config), self.experiment.holding_out(held_out))
        rates = processes.in_main(self._learning_rates)
        self._carry_out(planned(config, rates), self.experiment)
        return processes.in_main(self._write)

    def _carry_out(self, arms: list[Arm], experiment: PreparedExperiment) -> None:
        """Carry out the runs that are not finished, and update results.json after each."""
        finished = processes.in_main(lambda: finished_ids(arms, self.folder))
        if processes.is_main():
            for arm in arms:
                if arm.run_id in finished:
                    discard_temporary(run_folder(self.folder, arm))
        left = [arm for arm in arms if arm.run_id not in finished]
        self.progress.expect(len(left), len(arms) - len(left))
        for arm, run in self.executor(left, experiment, self.folder, self.progress.begin):
            self.progress.end(arm, run)
            processes.in_main(self._write)

    def _learning_rates(self) -> dict[ArmKey, float] | None:
        """The rates that the search has chosen so far; None without a search."""
        config = self.experiment.config
        if config.learning_rate_search is None:
            return None
        chosen, greater_is_better = best_by(config, self.experiment.data.metrics)
        return chosen_learning_rates(
            recorded_runs(searched(config), self.folder),
            metric_key(chosen.removeprefix("eval_")),
            greater_is_better,
        )

    def _write(self) -> Results:
        config = self.experiment.config
        results = Results(
            name=self.name,
            config=config.model_dump(mode="json"),
            runs=recorded_runs(planned(config, self._learning_rates()), self.folder),
            search=recorded_runs(searched(config), self.folder),
        )
        write_json(self.folder / RESULTS_FILE, results)
        return results


@contextlib.contextmanager
def _executor(ray_cpus: int | None) -> Iterator[Executor]:
    if ray_cpus is None:
        yield in_turn
        return
    from fish_tuning.experiments.runs.executors.over_ray import over_ray

    with over_ray(ray_cpus) as executor:
        yield executor


def _check_processes(config: ExperimentConfig, folder: Path) -> None:
    """Check that the folder's finished runs were trained by as many processes as there are now."""
    for run in recorded_runs([*searched(config), *planned(config)], folder):
        before = run.hardware.get("processes", 1)
        if run.status == "finished" and before != processes.count():
            raise ConfigError(
                f"training.output_dir: number of processes: {before} trained the runs in "
                f"{str(folder)!r}, but now there are {processes.count()}, so batches would have "
                f"another size; start {before}, or choose another folder"
            )
