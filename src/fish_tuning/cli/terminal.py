"""What the commands share: where they print, and what they say when something is wrong."""

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

_EXTRA = ("datasets", "jinja2", "matplotlib", "pyarrow", "scipy", "sklearn")

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
    """The number of this process among those that a launcher has started together, or 0."""
    return int(os.environ.get("RANK", 0))


def stdout() -> Console:
    """What a command was asked for."""
    from rich.console import Console

    return Console(highlight=False)


def say(message: str) -> None:
    """Say something beside the result, on stderr, as it stands."""
    from rich.console import Console

    # Unwrapped: paths and values in messages are there to be copied and searched for.
    Console(stderr=True).print(message, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn what a user can mend into one message and exit code 2.

    The library's warnings are shown meanwhile, each once.
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
    """Prints a warning of the library on stderr, once however often it is logged."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self.said and process_rank() == 0:
            self.said.add(message)
            say(f"note: {message}")


def quiet_libraries() -> None:
    """Keep the libraries' own bars and notices off the terminal; call before importing them."""
    for name, value in {
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
