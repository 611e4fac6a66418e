"""The report's files: CSV, Markdown and HTML, for one sweep or several."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from fish_tuning.atomic import write_atomically
from fish_tuning.experiments.report.pages import html_report, markdown_report
from fish_tuning.experiments.report.results_csv import csv_table
from fish_tuning.experiments.results import Results

CSV_FILE = "results.csv"
MARKDOWN_FILE = "report.md"
HTML_FILE = "report.html"

logger = logging.getLogger(__name__)


def write_report(results: Results | Sequence[Results], folder: Path) -> list[Path]:
    """Write `results.csv`, `report.md` and `report.html`; the same results give the same bytes.

    Args:
        results: One sweep, or several for one report.
        folder: Where the files go. It is created if necessary; existing files are replaced, each
            atomically.

    Returns:
        The files.
    """
    sweeps = [results] if isinstance(results, Results) else list(results)
    contents = {
        CSV_FILE: csv_table(sweeps),
        MARKDOWN_FILE: markdown_report(sweeps),
        HTML_FILE: html_report(sweeps),
    }
    paths = []
    for name, text in contents.items():
        # JSON can hold a lone surrogate, which UTF-8 cannot.
        write_atomically(folder / name, text.encode("utf-8", errors="replace"))
        paths.append(folder / name)
        logger.info("wrote %s", folder / name)
    return paths
