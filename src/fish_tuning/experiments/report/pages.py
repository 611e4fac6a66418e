"""The Markdown and the HTML report, from templates."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from itertools import count
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from plotly.offline import get_plotlyjs

from fish_tuning.experiments.report.comparison import (
    Comparison,
    compare,
    model_and_dataset,
    pool,
    summarize_search,
)
from fish_tuning.experiments.report.completeness import completeness, config_of
from fish_tuning.experiments.report.explanations import explain_arms, explain_checkpoint
from fish_tuning.experiments.report.figures.gallery import exhibits
from fish_tuning.experiments.report.figures.mask_map import highest_density
from fish_tuning.experiments.report.figures.style import color_by_arm
from fish_tuning.experiments.report.notes import notes_on
from fish_tuning.experiments.report.summary_table import (
    comparison_table,
    forgetting_table,
    overview_table,
    pooled_table,
    run_table,
    search_table,
)
from fish_tuning.experiments.report.verdict import pooled_verdict, search_verdict, verdict
from fish_tuning.experiments.results import Results, Run
from fish_tuning.experiments.tables import markdown_text

_TEMPLATES = "templates"


def html_report(sweeps: Sequence[Results]) -> str:
    """Return the report as one HTML file that loads nothing.

    What the files of a sweep hold is text in it, never markup: templates escape it, figures are
    JSON without a `<`, and the browser is told to run no script but the report's own two.
    """
    comparisons = [compare(sweep) for sweep in sweeps]
    masks = [
        [tensor for run in group.finished for tensor in run.mask_density]
        for comparison in comparisons
        for group in comparison.groups
    ]
    highest = highest_density(masks)
    sections: list[dict[str, Any]] = []
    figures: list[str] = []
    for number, sweep, comparison in zip(count(1), sweeps, comparisons, strict=False):
        shown = [e for e in exhibits(comparison, highest) if e.figure is not None]
        of_sweep = [
            {
                "number": len(figures) + place,
                "title": exhibit.title,
                "caption": exhibit.caption,
                "arm": exhibit.arm,
                "height": exhibit.figure.layout.height if exhibit.figure else 0,
            }
            for place, exhibit in enumerate(shown)
        ]
        figures += [exhibit.figure.to_json() for exhibit in shown if exhibit.figure]
        sections.append(_section(sweep, comparison) | {"number": number, "figures": of_sweep})
    script = files("fish_tuning.experiments.report") / _TEMPLATES / "report.js"
    scripts = [get_plotlyjs(), script.read_text(encoding="utf-8")]
    return (
        _environment(autoescape=True)
        .get_template("report.html")
        .render(
            _page(sweeps, comparisons, sections),
            figures=f"[{','.join(figures)}]".replace("<", "\\u003c"),
            scripts=scripts,
            script_hashes=" ".join(map(_hash, scripts)),
        )
    )


def markdown_report(sweeps: Sequence[Results]) -> str:
    """Return the report in Markdown: the verdict, tables and failed runs, without figures."""
    comparisons = [compare(sweep) for sweep in sweeps]
    sections = [_section(*pair) for pair in zip(sweeps, comparisons, strict=True)]
    environment = _environment(autoescape=False, finalize=_escape_markdown)
    return environment.get_template("report.md").render(_page(sweeps, comparisons, sections))


def _environment(**options: Any) -> Environment:
    return Environment(
        loader=PackageLoader("fish_tuning.experiments.report", _TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )


def _hash(script: str) -> str:
    """What a Content-Security-Policy calls a script that may run."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _escape_markdown(value: object) -> object:
    """Escape what a Markdown template writes, except what it marks as safe."""
    return value if hasattr(value, "__html__") else markdown_text(str(value))


def _page(
    sweeps: Sequence[Results], comparisons: Sequence[Comparison], sections: list[dict[str, Any]]
) -> dict[str, Any]:
    """What the templates show of all sweeps."""
    pooled = pool(comparisons)
    return {
        "title": sweeps[0].name if len(sweeps) == 1 else "Results",
        "sweeps": sections,
        "overview": overview_table(comparisons),
        "pooled": pooled_table(pooled),
        "pooled_verdict": pooled_verdict(pooled, comparisons[0].metric or "") if pooled else [],
        "notes": list(dict.fromkeys(note for c in comparisons for note in notes_on(c))),
    }


def _section(sweep: Results, comparison: Comparison) -> dict[str, Any]:
    """What the templates show of one sweep."""
    model, dataset = model_and_dataset(sweep)
    config = config_of(sweep)
    searched = summarize_search(sweep)
    return {
        "name": sweep.name,
        "model": model,
        "dataset": dataset,
        "completeness": completeness(sweep),
        "verdict": [*verdict(comparison), *search_verdict(searched)],
        "checkpoint": explain_checkpoint(sweep.runs, config),
        "arms": color_by_arm(group.arm for group in comparison.groups),
        "explanations": explain_arms(comparison.groups, config),
        "table": comparison_table(comparison),
        "forgetting": forgetting_table(comparison),
        "table_arms": [group.arm for group in comparison.groups],
        "search": search_table(searched),
        "example": _example(comparison),
        "runs": run_table(sweep.runs, comparison.metric),
        "run_arms": [run.arm for run in sweep.runs],
        "environment": _environment_of(sweep.runs),
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


def _environment_of(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Commit, hardware and versions, each with its different values over all runs."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        for name, value in {"commit": run.commit, **run.hardware, **run.versions}.items():
            if value is not None:
                found.setdefault(name, {})[str(value)] = None
    return {name: list(values) for name, values in found.items()}
