"""The table of all runs as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from fish_tuning.experiments.report.comparison import model_and_dataset
from fish_tuning.experiments.results import Results, Run


def csv_columns() -> dict[str, str]:
    """Return the columns before the metrics: name to description."""
    columns = {
        "experiment": "Name of the experiment.",
        "model": "`model.name` of its config.",
        "dataset": "Name, load_args or path of its data.",
    }
    for name, field in Run.model_fields.items():
        if _is_scalar(field.annotation):
            columns[name] = field.description or ""
    return columns


def _is_scalar(annotation: Any) -> bool:
    if isinstance(annotation, UnionType):
        return all(_is_scalar(option) for option in get_args(annotation))
    return annotation in (str, int, float, NoneType) or get_origin(annotation) is Literal


def csv_table(sweeps: Sequence[Results]) -> str:
    """Return a row per run, those of a search last; metrics are the last columns, by name."""
    runs = [(sweep, run) for sweep in sweeps for run in [*sweep.runs, *sweep.search]]
    kinds = ("metrics", "metrics_before")
    measured = {
        f"{kind}.{name}" for _, run in runs for kind in kinds for name in getattr(run, kind)
    }
    columns = [*csv_columns(), *sorted(measured)]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for sweep, run in runs:
        model, dataset = model_and_dataset(sweep)
        of_sweep = {"experiment": sweep.name, "model": model, "dataset": dataset}
        of_run = {
            f"{kind}.{name}": value for kind in kinds for name, value in getattr(run, kind).items()
        }
        writer.writerow({**dict(run), **of_sweep, **of_run})
    return stream.getvalue()
