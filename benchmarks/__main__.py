"""`python -m benchmarks`: runs the cases and writes their table."""

from __future__ import annotations

import gc
import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.base_weights import base_weights
from benchmarks.compiling import compiling
from benchmarks.first_step import files, time_to_the_first_step
from benchmarks.scoring import growth_of_scoring, memory_of_scoring, time_of_scoring
from benchmarks.scoring_text import memory_of_scoring_text, time_of_scoring_text
from benchmarks.selecting import application, top_k
from benchmarks.setting import Setting
from benchmarks.table import BETWEEN_RUNS, Results
from benchmarks.training import (
    growth_of_a_step,
    step_with_default_malloc,
    time_of_a_step,
    time_of_peers,
)
from benchmarks.training_memory import memory_of_training, optimizer_state
from benchmarks.training_text import (
    memory_of_training_on_text,
    time_of_a_step_on_text,
    time_of_peers_on_text,
)
from fish_tuning.experiments.environment import commit, hardware, versions

CASES = {
    case.__name__: case
    for case in (
        time_of_scoring,
        memory_of_scoring,
        growth_of_scoring,
        time_of_scoring_text,
        memory_of_scoring_text,
        time_of_a_step,
        time_of_peers,
        step_with_default_malloc,
        growth_of_a_step,
        time_of_a_step_on_text,
        time_of_peers_on_text,
        time_to_the_first_step,
        memory_of_training,
        memory_of_training_on_text,
        optimizer_state,
        files,
        base_weights,
        top_k,
        application,
        compiling,
    )
}
RESULTS = Path(__file__).parent / "results"


def main(
    device: Annotated[str, typer.Option(help="cpu, or an accelerator such as cuda.")] = "cpu",
    only: Annotated[
        list[str] | None, typer.Option(help=f"Cases to run, of: {', '.join(CASES)}.")
    ] = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Sizes that only show that it runs.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="A JSON file; by default results/DEVICE.json.")
    ] = None,
) -> None:
    """Measure speed and memory, and write a JSON file and a Markdown table."""
    if unknown := set(only or []) - CASES.keys():
        raise typer.BadParameter(f"{unknown.pop()!r}: choose from {', '.join(CASES)}")
    if device != "cpu" and not torch.accelerator.is_available():
        raise typer.BadParameter(f"{device!r}: this machine has no accelerator")
    if (tiny or only) and output is None:
        raise typer.BadParameter(
            "a partial or tiny run does not replace the results: give it an --output"
        )
    console = Console()
    setting = Setting(device, tiny)
    results = Results(environment(device))
    for name in only or CASES:
        start = time.perf_counter()
        with _quiet():
            for row in CASES[name](setting):
                results.rows.append(row)
                console.print(
                    " | ".join(row.cells()), markup=False, highlight=False, soft_wrap=True
                )
        gc.collect()
        console.print(f"{name}: {time.perf_counter() - start:.0f} s", style="dim", highlight=False)
    path = output or RESULTS / f"{device.partition(':')[0]}.json"
    if path.is_file():
        apart = results.agreement(Results.load(path))
        console.print(
            f"{len(results.rows) - len(apart)} of {len(results.rows)} figures agree with the "
            f"previous run: they lie in its spread, or at most {BETWEEN_RUNS:.0%} beyond it"
        )
        for line in apart:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    results.save(path)
    console.print(f"table: {path.with_suffix('.md')}", markup=False, soft_wrap=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries' warnings about random weights and short training."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def environment(device: str) -> dict[str, Any]:
    """Device, versions and commit."""
    found = hardware()
    return {
        "device": found.get("accelerator") if device != "cpu" else found["processor"],
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
        "hardware": found,
    }


app = typer.Typer(add_completion=False)
app.command()(main)

if __name__ == "__main__":
    app()
