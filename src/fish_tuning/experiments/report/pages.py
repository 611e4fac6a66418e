"""The Markdown and the HTML report, from templates."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fish_tuning.experiments.report.comparison import (
    Comparison,
    compare,
    model_and_dataset,
    pool,
    summarize_search,
)
from fish_tuning.experiments.report.gallery import exhibits
from fish_tuning.experiments.report.notes import notes_on
from fish_tuning.experiments.report.summary_table import (
    comparison_table,
    overview_table,
    pooled_table,
    run_table,
    search_table,
)
from fish_tuning.experiments.report.svg import to_svg
from fish_tuning.experiments.results import Results, Run
from fish_tuning.experiments.tables import markdown_text


def html_report(sweeps: Sequence[Results]) -> str:
    """Return the report as one HTML file that loads nothing and runs nothing."""
    return _render("report.html", sweeps)


def markdown_report(sweeps: Sequence[Results]) -> str:
    """Return the report in Markdown: tables and failed runs, without figures."""
    return _render("report.md", sweeps)


def _render(template: str, sweeps: Sequence[Results]) -> str:
    comparisons = [compare(sweep) for sweep in sweeps]
    markdown = template.endswith(".md")
    environment = Environment(
        loader=PackageLoader("fish_tuning.experiments.report"),
        autoescape=not markdown,
        finalize=_escape_markdown if markdown else None,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(
        title=sweeps[0].name if len(sweeps) == 1 else "Results",
        sweeps=list(map(_section, count(1), sweeps, comparisons)),
        overview=overview_table(comparisons),
        pooled=pooled_table(pool(comparisons)),
        notes=list(dict.fromkeys(note for c in comparisons for note in notes_on(c))),
    )


def _escape_markdown(value: object) -> object:
    """Escape what a Markdown template writes, except what it marks as safe."""
    return value if hasattr(value, "__html__") else markdown_text(str(value))


def _section(number: int, sweep: Results, comparison: Comparison) -> dict[str, Any]:
    """What the templates show of one sweep."""
    model, dataset = model_and_dataset(sweep)
    return {
        "number": number,
        "name": sweep.name,
        "model": model,
        "dataset": dataset,
        "table": comparison_table(comparison),
        "search": search_table(summarize_search(sweep)),
        "failed": [run for run in [*sweep.search, *sweep.runs] if run.status == "failed"],
        "example": _example(comparison),
        # A generator: only the template that shows the figures has them drawn.
        "figures": _figures(number, comparison),
        "runs": run_table(sweep.runs, comparison.metric),
        "environment": _environment(sweep.runs),
        "config": json.dumps(sweep.config, indent=2, ensure_ascii=False, default=str),
    }


def _example(comparison: Comparison) -> list[tuple[str, str]]:
    """What one prompt leads to: prompt, reference, and each arm's text; empty without texts."""
    runs = [(arm.label, run) for arm in comparison.arms for run in arm.runs.finished]
    examples = {label: run.example for label, run in reversed(runs) if run.example is not None}
    if not examples:
        return []
    first = list(examples.values())[-1]
    befores = {example.before for example in examples.values()}
    texts = [("Prompt", first.prompt), ("In the data", first.references[0])]
    if len(befores) == 1:
        texts.append(("Before training", first.before))
    for label, example in reversed(examples.items()):
        if len(befores) > 1:
            texts.append((f"{label}, before training", example.before))
        texts.append((f"{label}, after training", example.after))
    return texts


def _figures(number: int, comparison: Comparison) -> Iterator[dict[str, str]]:
    for position, (title, caption, figure) in enumerate(exhibits(comparison)):
        if figure is not None:
            svg = to_svg(figure, f"s{number}f{position}", f"{title}. {caption}")
            yield {"title": title, "caption": caption, "svg": svg}


def _environment(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Commit, hardware and versions, each with its different values over all runs."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, value in {"commit": run.commit, **run.hardware, **run.versions}.items():
            if value is not None:
                found.setdefault(name, {})[str(value)] = None
    return {name: list(values) for name, values in found.items()}
