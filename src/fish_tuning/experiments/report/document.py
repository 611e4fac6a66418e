"""The documentation of results, from the models' own descriptions.

Run `python -m fish_tuning.experiments.report.document > docs/results.md` after a change.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

from fish_tuning.experiments.report.write import CSV_FILE, HTML_FILE, MARKDOWN_FILE, csv_fields
from fish_tuning.experiments.results import (
    FORMAT_VERSION,
    RESULTS_FILE,
    RUN_FILE,
    RUNS_FOLDER,
    Results,
    Run,
    ScoreHistogram,
    TensorDensity,
)


def results_document() -> str:
    """Return the text of `docs/results.md`."""
    sections = [
        "# Results",
        "This file is generated: `python -m fish_tuning.experiments.report.document > "
        "docs/results.md`.",
        f"A sweep's output folder holds `{RESULTS_FILE}`, one `{RUNS_FOLDER}/RUN_ID/{RUN_FILE}` "
        "for each run with the run's own record, and three reports that `fish-tuning report` "
        f"rebuilds from `{RESULTS_FILE}`: `{CSV_FILE}`, `{MARKDOWN_FILE}` and `{HTML_FILE}`.",
        f"## {RESULTS_FILE}",
        f"`format_version` is {FORMAT_VERSION}. It changes when a field changes its meaning or "
        "goes; files of another version are refused. Times are in seconds, sizes in bytes.",
        *_model(Results),
        "## A run",
        f"Each entry of `runs`, and the content of `{RUN_FILE}`. A failed run has `error`, and "
        "what was measured until then.",
        *_model(Run),
        "## TensorDensity",
        "An entry of `mask_density`.",
        *_model(TensorDensity),
        "## ScoreHistogram",
        "An entry of `score_histograms`.",
        *_model(ScoreHistogram),
        f"## {CSV_FILE}",
        "One row a run, those of `runs` and then those of `search`, which have `held_out`; what is "
        "not known is empty. The first columns:",
        _table(("column", "meaning"), [(f"`{k}`", v) for k, v in csv_fields().items()]),
        "Then a column `metrics.NAME` for each metric that any run has, by name.",
    ]
    return "\n\n".join(sections) + "\n"


def _model(model: type[BaseModel]) -> list[str]:
    rows = [
        (f"`{name}`", _type_name(field.annotation), field.description or "")
        for name, field in model.model_fields.items()
    ]
    return [_table(("field", "type", "meaning"), rows)]


def _type_name(annotation: Any) -> str:
    name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    name = str(annotation) if "[" in str(annotation) else name
    name = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", name).replace("None", "null")
    return f"`{name}`"


def _table(headers: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    escaped = (tuple(cell.replace("|", "\\|") for cell in row) for row in rows)
    lines = [headers, tuple("---" for _ in headers), *escaped]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    sys.stdout.write(results_document())
