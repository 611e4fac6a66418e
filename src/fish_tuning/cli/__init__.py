"""The command line. Modules that are slow to import are imported only when a command needs them."""

from typing import Annotated

import typer

from fish_tuning import __version__
from fish_tuning.cli.env import env
from fish_tuning.cli.inspect import inspect
from fish_tuning.cli.pack import pack, unpack
from fish_tuning.cli.plan import plan
from fish_tuning.cli.report import report
from fish_tuning.cli.run import run
from fish_tuning.cli.terminal import process_rank

main = typer.Typer(
    name="fish-tuning",
    help="Train exactly the k parameters with the most Fisher information, and compare with LoRA.",
    no_args_is_help=True,
    # A user's mistake is one message (see `user_errors`); other errors need the full traceback.
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fish-tuning {__version__}")
        raise typer.Exit


@main.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    # Only training needs more than one of the processes that a launcher started.
    if process_rank() > 0 and context.invoked_subcommand != "run":
        raise typer.Exit


for _command in (run, plan, inspect, report, pack, unpack, env):
    main.command()(_command)
