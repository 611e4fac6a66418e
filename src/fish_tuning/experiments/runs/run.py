"""A sweep: every run of an experiment, each recorded once, resumable at any moment."""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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

from fish_tuning.experiments.arms import Arm, ArmKey, planned, searched
from fish_tuning.experiments.config.load import check_output_dir
from fish_tuning.experiments.config.schema import ExperimentConfig
from fish_tuning.experiments.data.load import load_data, tokenize
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.metrics import KNOWN_METRICS
from fish_tuning.experiments.models.counts import count_parameters
from fish_tuning.experiments.models.find import check_model
from fish_tuning.experiments.models.load import load_tokenizer, quantization_options
from fish_tuning.experiments.results import (
    RESULTS_FILE,
    RUN_FILE,
    RUNS_FOLDER,
    Results,
    Run,
    read_run,
    write_json,
)
from fish_tuning.experiments.runs import environment, processes, training
from fish_tuning.experiments.runs.measurements import Report
from fish_tuning.experiments.runs.preflight import check_training_args
from fish_tuning.experiments.runs.search import LOSS, chosen_learning_rates

logger = logging.getLogger(__name__)

_LOCK = ".lock"

Engine = Callable[
    [Sequence[Arm], training.Task, Path, Callable[[Arm], Report]], Iterator[tuple[Arm, Run]]
]
"""Carries out runs and gives each as it ends. It is given the arms, what they share, the output
folder, and a function to call when a run begins, which returns whom to tell of its steps."""


def run_experiment(config: ExperimentConfig, *, name: str, ray_cpus: int | None = None) -> Results:
    """Carry out all runs of an experiment that are not finished yet.

    With a `learning_rate_search`, its runs come first: they choose each arm's learning rate.

    Each run's record is written once, when it ends; `results.json` holds those of the plan, in
    its order, and is written anew after each. Called again after an interruption, of whatever
    kind, it skips the finished runs, goes on with the interrupted one from its last whole
    checkpoint, and tries failed ones again.

    Where a launcher has started several processes, all of them call: they train each run together,
    and the first one writes. A run that fails in all of them is recorded and the others go on; one
    that fails in some only ends the program.

    Args:
        config: The experiment.
        name: Its name in the results.
        ray_cpus: Cores of each run, several of which are then trained at a time as tasks of Ray
            (`fish_tuning.experiments.runs.engine_ray`). None trains one after the other, here.

    Returns:
        The records of all runs.

    Raises:
        ConfigError: Something in the config, the model or the data is wrong, another sweep runs
            in the same folder, its runs are of another number of processes, or no machine has
            `ray_cpus` cores. Before anything is trained, and nothing has been written.
        KeyboardInterrupt: The sweep was interrupted; calling again goes on with it.
    """
    with quiet(), contextlib.ExitStack() as stack:
        task = _prepared(config)
        folder = Path(config.training.output_dir)

        def claim() -> None:
            _check_processes(config, folder)
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(folder))

        processes.in_main(claim)
        engine = stack.enter_context(_engine(ray_cpus))
        progress = stack.enter_context(_progress())

        def write() -> Results:
            return _write_results(task, name, folder)

        search = config.learning_rate_search
        held_out = task.holding_out(search.held_out) if search else task
        for _ in _unfinished(searched(config), held_out, folder, progress, engine):
            processes.in_main(write)
        rates = processes.in_main(
            lambda: _learning_rates(task, _recorded(searched(config), folder))
        )
        for _ in _unfinished(planned(config, rates), task, folder, progress, engine):
            processes.in_main(write)
        return processes.in_main(write)


def _prepared(config: ExperimentConfig) -> training.Task:
    """Everything that can be wrong with a config is found here, before weights are loaded."""
    folder = Path(config.training.output_dir)
    check_output_dir(folder)
    check_training_args(config)
    check_model(config.model.name, weights=True)
    quantization_options(config.model)
    training.training_arguments(config, folder, config.seeds[0], tuple(KNOWN_METRICS))
    tokenizer = load_tokenizer(config.model, config.training.max_seq_length)
    known = config.dataset.known_num_labels
    counts = None if known is None else count_parameters(config, known)
    data = load_data(config.dataset)
    training.training_arguments(config, folder, config.seeds[0], data.metrics)
    if counts is None or data.num_labels != known:
        counts = count_parameters(config, data.num_labels)
    search = config.learning_rate_search
    if search is not None and search.held_out >= len(data.train):
        raise ConfigError(
            f"learning_rate_search.held_out: {search.held_out:,} of {len(data.train):,} training "
            "examples leave none to train on; hold out fewer"
        )
    train, validation = tokenize(data, tokenizer, config.training.max_seq_length)
    return training.Task(
        config=config,
        data=data,
        train=train,
        validation=validation,
        tokenizer=tokenizer,
        counts=counts,
        commit=environment.commit(),
    )


@contextlib.contextmanager
def _engine(ray_cpus: int | None) -> Iterator[Engine]:
    if ray_cpus is None:
        yield _in_turn
        return
    from fish_tuning.experiments.runs.engine_ray import over_ray

    with over_ray(ray_cpus) as engine:
        yield engine


def _in_turn(
    arms: Sequence[Arm], task: training.Task, output_dir: Path, begin: Callable[[Arm], Report]
) -> Iterator[tuple[Arm, Run]]:
    for arm in arms:
        yield arm, carry_out(arm, task, run_folder(output_dir, arm), begin(arm))


def _unfinished(
    arms: Iterable[Arm],
    task: training.Task,
    output_dir: Path,
    progress: Progress,
    engine: Engine,
) -> Iterator[Run]:
    """Carries out the runs that are not finished, and gives each when it is recorded."""
    arms = list(arms)
    folders = [run_folder(output_dir, arm) for arm in arms]
    finished = processes.in_main(lambda: [_finished(folder) for folder in folders])
    if processes.is_main():
        for folder in itertools.compress(folders, finished):
            training.discard_temporary(folder)
    lines: dict[str, TaskID] = {}

    def begin(arm: Arm) -> Report:
        line = progress.add_task(_title(arm), total=None, note="preparing")
        lines[arm.run_id] = line

        def report(step: int, total: int, loss: float | None) -> None:
            note = "" if loss is None else f"loss {loss:.4f}"
            progress.update(line, completed=step, total=total, note=note)

        return report

    todo = [arm for arm, done in zip(arms, finished, strict=True) if not done]
    for arm, run in engine(todo, task, output_dir, begin):
        _close(progress, lines[arm.run_id], _title(arm), run)
        yield run


def carry_out(arm: Arm, task: training.Task, folder: Path, report: Report) -> Run:
    """Carry out one run and record it, also when it fails.

    Args:
        arm: The arm.
        task: What the runs share.
        folder: The run's own folder.
        report: Told of every step.

    Returns:
        The record.

    Raises:
        OSError: The record cannot be written.
    """
    started = datetime.now(UTC).isoformat(timespec="seconds")
    error = None
    try:
        run = training.run_arm(arm, task, folder, report)
    # A run may fail in whatever way; the others go on.
    except Exception as caught:
        error = caught
        logger.debug("%s failed", _title(arm), exc_info=True)
    if (error := processes.agree_on(error)) is not None:
        logger.error("%s failed: %s: %s", _title(arm), type(error).__name__, error)
        run = training.failed_run(arm, task, error, started)
    if processes.is_main():
        record(run, folder)
    del error  # Its traceback holds the run's model.
    training.free_memory()
    return run


def record(run: Run, folder: Path) -> None:
    """Write a run's record, and remove what only an interrupted run needs."""
    write_json(folder / RUN_FILE, run)
    training.discard_temporary(folder)


def run_folder(output_dir: Path, arm: Arm) -> Path:
    """The folder of one run."""
    return output_dir / RUNS_FOLDER / arm.run_id


def _title(arm: Arm) -> str:
    title = f"{arm.name}{'' if arm.ratio is None else f' {arm.ratio:g}'}, seed {arm.seed}"
    return title if arm.held_out is None else f"{title}, learning rate {arm.learning_rate:g}"


def _close(progress: Progress, line: TaskID, title: str, run: Run) -> None:
    note = "failed"
    if run.status == "finished" and run.main_metric is not None:
        note = f"{run.main_metric} {run.metrics.get(run.main_metric, float('nan')):.4f}"
    progress.update(line, note=note)
    progress.stop_task(line)
    if progress.disable:
        progress.console.print(f"{title}: {note}", highlight=False)


def _finished(folder: Path) -> bool:
    try:
        return read_run(folder / RUN_FILE).status == "finished"
    except ConfigError:
        return False


def _check_processes(config: ExperimentConfig, folder: Path) -> None:
    for arm in [*searched(config), *planned(config)]:
        record = folder / RUNS_FOLDER / arm.run_id / RUN_FILE
        if _finished(record.parent):
            before = read_run(record).hardware.get("processes", 1)
            if before != processes.count():
                raise ConfigError(
                    f"training.output_dir: number of processes: {before} trained the runs in "
                    f"{str(folder)!r} and now there are {processes.count()}, whose batches would "
                    "be of another size; start as many, or choose another folder"
                )


def _learning_rates(task: training.Task, search: Iterable[Run]) -> dict[ArmKey, float] | None:
    """What the runs of a search have chosen so far; None without a search."""
    if task.config.learning_rate_search is None:
        return None
    chosen, greater_is_better = training.best_by(task.config, task.data.metrics)
    metric = chosen.removeprefix("eval_")
    return chosen_learning_rates(search, LOSS if metric == "loss" else metric, greater_is_better)


def _recorded(arms: Iterable[Arm], folder: Path) -> list[Run]:
    runs = []
    for arm in arms:
        with contextlib.suppress(ConfigError):
            runs.append(read_run(folder / RUNS_FOLDER / arm.run_id / RUN_FILE))
    return runs


def _write_results(task: training.Task, name: str, folder: Path) -> Results:
    config = task.config
    search = _recorded(searched(config), folder)
    results = Results(
        name=name,
        config=config.model_dump(mode="json"),
        runs=_recorded(planned(config, _learning_rates(task, search)), folder),
        search=search,
    )
    write_json(folder / RESULTS_FILE, results)
    return results


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps a second sweep out of a folder; the lock goes with the process, however it ends."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with (folder / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"training.output_dir: another process is running an experiment in {str(folder)!r};"
                " wait for it, or choose another folder"
            ) from None
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences the libraries' notices and progress bars; ours and errors stay."""
    # Their functions have no annotations.
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


def _progress() -> Progress:
    """One line a run; where nothing can be redrawn, a line when a run ends."""
    console = Console(stderr=True, quiet=not processes.is_main())
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=not (console.is_terminal and processes.is_main()),
    )
