"""The Markdown and the HTML report, from templates."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from fish_tuning.experiments.report.columns import (
    comparison_table,
    overview_table,
    pooled_table,
    run_table,
    search_table,
)
from fish_tuning.experiments.report.comparison import (
    Comparison,
    compare,
    model_and_dataset,
    pool,
    summarize_search,
)
from fish_tuning.experiments.report.gallery import exhibits
from fish_tuning.experiments.report.notes import notes_on
from fish_tuning.experiments.report.svg import to_svg
from fish_tuning.experiments.results import Results, Run
from fish_tuning.experiments.tables import Table, markdown_text


@dataclass(frozen=True)
class Section:
    """What the templates show of one sweep."""

    number: int
    results: Results
    comparison: Comparison

    @property
    def name(self) -> str:
        """Name of the experiment."""
        return self.results.name

    @property
    def model(self) -> str:
        """What was trained."""
        return model_and_dataset(self.results)[0]

    @property
    def dataset(self) -> str:
        """What it was trained on."""
        return model_and_dataset(self.results)[1]

    @property
    def table(self) -> Table:
        """The arms side by side."""
        return comparison_table(self.comparison)

    @property
    def search(self) -> Table:
        """The learning rates tried; no rows without a search."""
        return search_table(summarize_search(self.results))

    @property
    def runs(self) -> Table:
        """All runs, those of a search aside."""
        return run_table(self.results.runs, self.comparison.metric)

    @property
    def failed(self) -> list[Run]:
        """The runs that failed, those of a search included."""
        runs = [*self.results.search, *self.results.runs]
        return [run for run in runs if run.status == "failed"]

    @property
    def environment(self) -> dict[str, list[str]]:
        """Commit, hardware and versions: the different values over all runs."""
        found: dict[str, dict[str, None]] = {}
        for run in self.results.runs:
            for name, value in {"commit": run.commit, **run.hardware, **run.versions}.items():
                if value is not None:
                    found.setdefault(name, {})[str(value)] = None
        return {name: list(values) for name, values in found.items()}

    @property
    def config(self) -> str:
        """The resolved config, as JSON."""
        return json.dumps(self.results.config, indent=2, ensure_ascii=False, default=str)

    def figures(self) -> Iterator[dict[str, str]]:
        """Draw the figures: title, caption and `svg` element of each."""
        for position, (title, caption, figure) in enumerate(exhibits(self.comparison)):
            if figure is not None:
                svg = to_svg(figure, f"s{self.number}f{position}", f"{title}. {caption}")
                yield {"title": title, "caption": caption, "svg": svg}


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
        sweeps=[
            Section(number, sweep, comparison)
            for number, (sweep, comparison) in enumerate(
                zip(sweeps, comparisons, strict=True), start=1
            )
        ],
        overview=overview_table(comparisons),
        pooled=pooled_table(pool(comparisons)),
        notes=list(dict.fromkeys(note for c in comparisons for note in notes_on(c))),
    )


def _escape_markdown(value: object) -> object:
    """Escape what a Markdown template writes, except what it marks as safe."""
    return value if hasattr(value, "__html__") else markdown_text(str(value))
