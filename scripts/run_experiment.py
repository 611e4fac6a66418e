"""Run an experiment: the original work's entry point, the same as `fish-tuning run`."""

from pathlib import Path
from typing import Annotated

import typer

from fish_tuning.cli.run import run
from fish_tuning.cli.terminal import Overrides


def main(
    config: Annotated[Path, typer.Option(help="The experiment's YAML.", show_default=False)],
    overrides: Overrides = None,
) -> None:
    """Run every arm with every seed and write the report."""
    run(config, overrides)


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
