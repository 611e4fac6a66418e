"""`fish-tuning run`."""

from __future__ import annotations

import os
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fish_tuning.cli.terminal import (
    EXIT_FAILED_RUNS,
    EXIT_INTERRUPTED,
    ConfigFile,
    Overrides,
    process_rank,
    quiet_libraries,
    say,
    show,
    stdout,
    user_errors,
)

if TYPE_CHECKING:
    from fish_tuning.experiments.runs.preflight import CheckedExperiment


def run(
    config_file: ConfigFile,
    overrides: Overrides = None,
    num_processes: Annotated[
        int,
        typer.Option(
            min=1, help="Processes that train each run together, started by accelerate launch."
        ),
    ] = 1,
    ray: Annotated[
        bool,
        typer.Option("--ray", help="Spread the runs over a Ray cluster, or over this machine."),
    ] = False,
    cpus_per_run: Annotated[
        int | None,
        typer.Option(min=1, help="Cores per run with --ray; 1 by default.", show_default=False),
    ] = None,
) -> None:
    """Run every arm with every seed and write the report.

    The same command again skips finished runs and resumes an interrupted one.

    Exit codes: 0 all runs finished, 1 some failed, 2 mistake in config or data, 130 interrupted.
    """
    words = [str(config_file), *(word for o in overrides or [] for word in ("--set", o))]
    try:
        with user_errors():
            _check_ray(ray, cpus_per_run, num_processes)
            checked = _checked(config_file, overrides or [])
            if num_processes > 1:
                _launch(words, num_processes)
            else:
                _run(checked, config_file.stem, (cpus_per_run or 1) if ray else None)
    except KeyboardInterrupt:
        if num_processes > 1:
            words += ["--num-processes", str(num_processes)]
        if ray:
            words += ["--ray"]
        if cpus_per_run is not None:
            words += ["--cpus-per-run", str(cpus_per_run)]
        if process_rank() == 0:
            command = f"fish-tuning run {shlex.join(words)}"
            say(f"stopped; the same command continues from here: {command}")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _check_ray(ray: bool, cpus_per_run: int | None, num_processes: int) -> None:
    if not ray:
        if cpus_per_run is not None:
            raise ValueError(
                f"--cpus-per-run {cpus_per_run}: needs --ray; add it, or remove this option"
            )
        return
    if max(num_processes, int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError(
            "--ray: runs that several processes train together cannot be spread over Ray; use "
            "--ray alone, or else --num-processes or another launcher"
        )
    if find_spec("ray") is None:
        raise ModuleNotFoundError("ray is not installed; run: pip install 'fish-tuning[ray]'")


def _checked(config_file: Path, overrides: list[str]) -> CheckedExperiment:
    """Load the config and check what can be checked without importing torch."""
    from fish_tuning.experiments.config.load import load_config
    from fish_tuning.experiments.runs.preflight import check_experiment

    config = load_config(config_file, overrides)
    quiet_libraries()
    return check_experiment(config, source=str(config_file))


def _launch(words: list[str], num_processes: int) -> None:
    """Start this command in several processes on this machine, and exit as they do."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Options override accelerate's own config file: only the experiment's config counts.
    # "multi_gpu" means several processes on one machine, even without an accelerator.
    options = ["--multi_gpu", "--num_processes", str(num_processes), "--num_machines", "1"]
    options += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    program = ["-m", "fish_tuning.cli", "run", *words]
    try:
        launch_command(launch_command_parser().parse_args([*options, *program]))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        raise typer.Exit(max(EXIT_FAILED_RUNS, failure.exitcode)) from None
    except SignalException:
        raise KeyboardInterrupt from None


def _run(checked: CheckedExperiment, name: str, ray_cpus: int | None) -> None:
    from fish_tuning.experiments.report.comparison import compare, summarize_search
    from fish_tuning.experiments.report.summary_table import comparison_table, forgetting_table
    from fish_tuning.experiments.report.verdict import search_verdict, verdict
    from fish_tuning.experiments.report.write import write_report
    from fish_tuning.experiments.runs import processes
    from fish_tuning.experiments.runs.sweep import run_checked

    results = run_checked(checked, name=name, ray_cpus=ray_cpus)
    main = processes.is_main()
    processes.end()
    if not main:
        return
    paths = write_report(results, Path(checked.config.training.output_dir))
    comparison = compare(results)
    for table in (comparison_table(comparison), forgetting_table(comparison)):
        if table.headers:
            stdout().print(table.terminal())
    for finding in [*verdict(comparison), *search_verdict(summarize_search(results))]:
        stdout().print(str(finding), markup=False)
    for path in paths:
        show(str(path))
    runs = [*results.search, *results.runs]
    failed = [run for run in runs if run.status == "failed"]
    if failed:
        say(f"{len(failed)} of {len(runs)} runs failed; run the same command to try them again:")
        for run in failed:
            say(f"  {run.run_id}: {run.error}")
        raise typer.Exit(EXIT_FAILED_RUNS)
