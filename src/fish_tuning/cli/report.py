"""`fish-tuning report`."""

from pathlib import Path
from typing import Annotated

import typer

from fish_tuning.cli.terminal import quiet_libraries, show, user_errors


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Folders with a results.json.", show_default=False),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write to; required for several sweeps.", show_default=False),
    ] = None,
    method_comparison: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write each run of a language model to, in the form of the results of "
            "PEFT's method_comparison.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Rebuild the report of one sweep, or write one over several."""
    with user_errors():
        from fish_tuning.experiments.errors import ConfigError
        from fish_tuning.experiments.results import read_results

        if output is None and len(folders) > 1:
            raise ConfigError(
                f"--output: is required for a report over {len(folders)} sweeps, which belongs "
                "to none of their folders; add --output DIR"
            )
        results = [read_results(folder) for folder in folders]
        home = folders[0] if folders[0].is_dir() else folders[0].parent
        quiet_libraries()

        from fish_tuning.experiments.report.write import write_report

        paths = write_report(results, output or home)
        if method_comparison is not None:
            from fish_tuning.experiments.report.method_comparison import write_method_comparison

            for folder, sweep in zip(folders, results, strict=True):
                home = folder if folder.is_dir() else folder.parent
                paths += write_method_comparison(sweep, home, method_comparison)
        for path in paths:
            show(str(path))
