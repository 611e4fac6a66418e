"""Reports of one sweep or several: CSV, Markdown and HTML."""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from fish_tuning.atomic import write_atomically
from fish_tuning.experiments.report.comparison import (
    LEARNING_RATES,
    OVER_ALL,
    compare,
    learning_rate_table,
    model_and_dataset,
    pooled_table,
    shared_notes,
)
from fish_tuning.experiments.report.html import html_report
from fish_tuning.experiments.results import Results, Run

CSV_FILE = "results.csv"
MARKDOWN_FILE = "report.md"
HTML_FILE = "report.html"

logger = logging.getLogger(__name__)


def write_report(results: Results | Sequence[Results], folder: Path) -> list[Path]:
    """Write `results.csv`, `report.md` and `report.html`; the same results give the same bytes.

    Args:
        results: One sweep, or several for one report.
        folder: Where the files go; made if need be. Earlier ones are replaced, each atomically.

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
        # A lone surrogate, which JSON can hold, must not cost the report.
        write_atomically(folder / name, text.encode("utf-8", errors="replace"))
        paths.append(folder / name)
        logger.info("wrote %s", folder / name)
    return paths


def csv_fields() -> dict[str, str]:
    """The columns of `results.csv` before the metrics: name to description."""
    fields = {
        "experiment": "Name of the experiment.",
        "model": "`model.name` of its config.",
        "dataset": "Name, load_args or path of its data.",
    }
    for name, field in Run.model_fields.items():
        if _is_scalar(field.annotation):
            fields[name] = field.description or ""
    return fields


def _is_scalar(annotation: Any) -> bool:
    if isinstance(annotation, UnionType):
        return all(_is_scalar(option) for option in get_args(annotation))
    return annotation in (str, int, float, NoneType) or get_origin(annotation) is Literal


def csv_table(sweeps: Iterable[Results]) -> str:
    """One row for each run, those of a search last; metrics are the last columns, by name."""
    sweeps = list(sweeps)
    metrics = sorted({name for s in sweeps for run in [*s.runs, *s.search] for name in run.metrics})
    fields = list(csv_fields())
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*fields, *(f"metrics.{name}" for name in metrics)])
    for sweep in sweeps:
        of_sweep = [sweep.name, *model_and_dataset(sweep)]
        for run in [*sweep.runs, *sweep.search]:
            of_run = [getattr(run, name) for name in fields[len(of_sweep) :]]
            writer.writerow([*of_sweep, *of_run, *(run.metrics.get(name) for name in metrics)])
    return stream.getvalue()


def markdown_report(sweeps: Iterable[Results]) -> str:
    """A section for each sweep: the table and what failed; then how it was measured."""
    sweeps = list(sweeps)
    comparisons = [compare(sweep) for sweep in sweeps]
    parts = ["# Results"]
    pooled = pooled_table(comparisons)
    if pooled:
        parts += [f"{OVER_ALL}:", _table(*pooled)]
    for sweep, comparison in zip(sweeps, comparisons, strict=True):
        model, dataset = model_and_dataset(sweep)
        parts += [
            f"## {_text(sweep.name)}",
            f"Model: {_text(model)}. Data: {_text(dataset)}.",
            _table(comparison.headers, comparison.rows) if comparison.rows else "No run yet.",
        ]
        tried = learning_rate_table(sweep)
        if tried:
            parts += [f"{LEARNING_RATES}:", _table(*tried)]
        failed = [run for run in [*sweep.search, *sweep.runs] if run.status == "failed"]
        if failed:
            items = [
                f"- {_text(run.run_id)}: {_text(run.error or 'no error was recorded')}"
                for run in failed
            ]
            parts += ["Failed runs:", "\n".join(items)]
    notes = "\n".join(f"- {_text(note)}" for note in shared_notes(comparisons))
    return "\n\n".join([*parts, "## How this was measured", notes]) + "\n"


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(headers) - 1)]
    lines = [map(_text, headers), rule, *(map(_text, row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _text(text: str) -> str:
    """Text from a file as Markdown that shows it on one line and means nothing else."""
    plain = re.sub(r"([\\`*\[\]|~#$]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))
    return escape(plain, quote=False)
