"""Running the command line inside tests, and what it leaves behind."""

import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from fish_tuning.cli import main


def invoke(*arguments: str | Path):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def process(*arguments: str | Path, **kwargs) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fish_tuning.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


def listing(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}
