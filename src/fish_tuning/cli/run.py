"""`fish-tuning run`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fish_tuning.cli.terminal import (
    EXIT_FAILED_RUNS,
    EXIT_INTERRUPTED,
    ConfigFile,
    Overrides,
    quiet_libraries,
    say,
    stdout,
    user_errors,
)

if TYPE_CHECKING:
    from rich.table import Table

    from fish_tuning.experiments.results import Results


def run(config_file: ConfigFile, overrides: Overrides = None) -> None:
    """Run every arm with every seed and write the report.

    The same command skips what is finished and goes on where it stopped.

    Exit codes: 0 all runs finished, 1 some failed, 2 config or data at fault, 130 interrupted.
    """
    try:
        with user_errors():
            _run(config_file, overrides or [])
    except KeyboardInterrupt:
        words = [str(config_file), *(word for o in overrides or [] for word in ("--set", o))]
        say(f"stopped; the same command goes on from here: fish-tuning run {shlex.join(words)}")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _run(config_file: Path, overrides: list[str]) -> None:
    from fish_tuning.experiments.checks import check_before_run, check_local_data
    from fish_tuning.experiments.config import load_config

    config = load_config(config_file, overrides)
    quiet_libraries()
    # The runner checks all of this too, seconds later: importing it imports torch.
    check_before_run(config)
    check_local_data(config)

    from fish_tuning.experiments.report import write_report
    from fish_tuning.experiments.run import run_experiment

    results = run_experiment(config, name=config_file.stem)
    paths = write_report(results, Path(config.training.output_dir))
    stdout().print(_table(results))
    for path in paths:
        stdout().print(str(path), markup=False, soft_wrap=True)
    failed = [run for run in results.runs if run.status == "failed"]
    if failed:
        say(f"{len(failed)} of {len(results.runs)} runs failed; the same command tries them again:")
        for run in failed:
            say(f"  {run.run_id}: {run.error}")
        raise typer.Exit(EXIT_FAILED_RUNS)


def _table(results: Results) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    from fish_tuning.experiments.comparison import compare

    comparison = compare(results)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for position, header in enumerate(comparison.headers):
        table.add_column(header, justify="right" if position else "left", overflow="fold")
    for row in comparison.rows:
        table.add_row(*map(Text, row))
    return table
