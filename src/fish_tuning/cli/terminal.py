"""Shared by the commands: where they print, and how they report errors."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

EXIT_FAILED_RUNS = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

_EXTRA = ("datasets", "jinja2", "matplotlib", "plotly", "pyarrow", "scipy", "sklearn")

ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="The experiment's YAML.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a value of the config, such as lora.fish_rank=32; may be repeated.",
        show_default=False,
    ),
]


def process_rank() -> int:
    """Return the rank of this process among those that a launcher started; 0 for a single one."""
    return int(os.environ.get("RANK", 0))


def stdout() -> Console:
    """Return the console for a command's result."""
    from rich.console import Console

    return Console(highlight=False)


def show(line: str) -> None:
    """Print a line of a command's result as it is, without markup and unwrapped."""
    stdout().print(line, markup=False, soft_wrap=True)


def say(message: str) -> None:
    """Print a message on stderr, without markup."""
    from rich.console import Console

    # Not wrapped, so that paths and values can be copied and searched for.
    Console(stderr=True).print(message, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def user_errors() -> Iterator[None]:
    """Report errors that the user can fix as one message, with exit code 2.

    Within the context, each of the library's warnings is printed once.
    """
    logger = logging.getLogger("fish_tuning")
    notices = _Notices(logging.WARNING)
    logger.addHandler(notices)
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in _EXTRA:
            say(f"error: {package} is not installed; run: pip install 'fish-tuning[experiments]'")
        elif "pip install" in str(error):
            say(f"error: {error}")
        else:
            raise
        raise typer.Exit(EXIT_BAD_INPUT) from None
    except (ValueError, OSError) as error:
        say(f"error: {error}")
        raise typer.Exit(EXIT_BAD_INPUT) from None
    finally:
        logger.removeHandler(notices)


class _Notices(logging.Handler):
    """Prints each of the library's warnings on stderr once, however often it is logged."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.printed: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self.printed and process_rank() == 0:
            self.printed.add(message)
            say(f"note: {message}")


def quiet_libraries() -> None:
    """Turn off the libraries' own progress bars and notices; call before importing them."""
    for name, value in {
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }.items():
        os.environ.setdefault(name, value)
    # It warns of a faster kernel that nobody needs here, whenever PEFT imports it.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
