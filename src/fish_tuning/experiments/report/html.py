"""The HTML report: one file, nothing to load, nothing to run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from html import escape
from string import Template

from matplotlib.figure import Figure

from fish_tuning.experiments.report.comparison import (
    LEARNING_RATES,
    MISSING,
    OVER_ALL,
    Comparison,
    compare,
    learning_rate_table,
    metric_title,
    model_and_dataset,
    pooled_table,
    shared_notes,
)
from fish_tuning.experiments.report.figures import (
    density_figure,
    metric_by_arm,
    score_distribution,
    trade_off,
    training_loss,
    validation_curve,
)
from fish_tuning.experiments.report.statistics import Group, percent
from fish_tuning.experiments.report.svg import to_svg
from fish_tuning.experiments.results import Results, Run

_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
$style
</style>
</head>
<body>
<main>
<h1>$title</h1>
$body
</main>
</body>
</html>
""")

_CSS = """\
:root { color-scheme: light dark; --text: #1f2328; --muted: #59636f; --grid: #d1d9e1;
  --page: #ffffff; --panel: #f6f8fa; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --muted: #9aa7b4; --grid: #363e48;
  --page: #0d1117; --panel: #161b22; --bad: #ff8f87; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1200px; margin: 0 auto; padding: 1rem; }
h1, h2, h3 { line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--grid); }
h3 { margin: 2rem 0 .75rem; font-size: 1.1rem; }
p, li, dd, summary { overflow-wrap: anywhere; }
p { margin: .5rem 0; }
.muted, figcaption { color: var(--muted); font-size: .9rem; }
.scroll { overflow-x: auto; margin: .75rem 0; border: 1px solid var(--grid); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--grid); }
th { background: var(--panel); font-weight: 600; }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { text-align: left; }
td:first-child { min-width: 9rem; max-width: 16rem; white-space: normal; overflow-wrap: anywhere; }
.bad { color: var(--bad); }
.figures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
figure { margin: 0; padding: .75rem; background: var(--panel); border: 1px solid var(--grid);
  border-radius: 6px; min-width: 0; }
figcaption { margin-bottom: .5rem; }
figcaption b { color: var(--text); font-size: 1rem; }
figure svg { display: block; width: 100%; height: auto; margin: 0 auto; }
figure svg * { stroke-linejoin: round; }
figure svg text {
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif !important; }
pre { margin: .5rem 0; padding: .75rem; background: var(--panel); border: 1px solid var(--grid);
  border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
details { margin: .75rem 0; }
summary { cursor: pointer; }
@media (max-width: 600px) { main { padding: .75rem; } figure { padding: .5rem; } }
dt { font-weight: 600; }
dd { margin: 0 0 .5rem; }"""


def html_report(sweeps: Sequence[Results]) -> str:
    """Return the page: a section for each sweep."""
    title = sweeps[0].name if len(sweeps) == 1 else "Results"
    comparisons = [compare(sweep) for sweep in sweeps]
    parts = []
    if len(sweeps) > 1:
        parts.append(_overview(sweeps, comparisons))
        pooled = pooled_table(comparisons)
        if pooled:
            parts += [f"<p>{OVER_ALL}:</p>", _table_of(*pooled)]
    for number, (sweep, comparison) in enumerate(zip(sweeps, comparisons, strict=True), start=1):
        parts.append(_section(sweep, comparison, number, heading=len(sweeps) > 1))
    notes = "".join(f"<li>{escape(note)}</li>" for note in shared_notes(comparisons))
    parts.append(f'<h2>How this was measured</h2><ul class="muted">{notes}</ul>')
    return _PAGE.substitute(title=escape(title), style=_CSS, body="\n".join(parts))


def _overview(sweeps: Sequence[Results], comparisons: Sequence[Comparison]) -> str:
    """Links to the sections, and their main metric by arm."""
    arms = list(dict.fromkeys(row[0] for comparison in comparisons for row in comparison.rows))
    lines = []
    for number, (sweep, comparison) in enumerate(zip(sweeps, comparisons, strict=True), start=1):
        values = comparison.metric_cells
        cells = [metric_title(comparison.metric), *(values.get(arm, MISSING) for arm in arms)]
        lines.append(
            f'<tr><td><a href="#sweep-{number}">{escape(sweep.name)}</a></td>{_cells(cells)}</tr>'
        )
    return _table(["Experiment", "Metric", *arms], lines)


def _section(sweep: Results, comparison: Comparison, number: int, heading: bool) -> str:
    model, dataset = model_and_dataset(sweep)
    parts = [f'<section id="sweep-{number}">']
    if heading:
        parts.append(f"<h2>{escape(sweep.name)}</h2>")
    parts.append(f"<p>Model: {escape(model)}. Data: {escape(dataset)}.</p>")
    if comparison.rows:
        parts.append(_table_of(comparison.headers, comparison.rows))
    else:
        parts.append("<p>No run yet.</p>")
    tried = learning_rate_table(sweep)
    if tried:
        parts += [f"<h3>{LEARNING_RATES}</h3>", _table_of(*tried)]
    failed = [run for run in [*sweep.search, *sweep.runs] if run.status == "failed"]
    if failed:
        parts.append("<h3>Failed runs</h3>")
        for run in failed:
            error = escape(run.error or "no error was recorded")
            parts.append(f'<p class="bad">{escape(run.run_id)}</p><pre>{error}</pre>')
    figures = _figures(comparison, f"s{number}")
    if figures:
        parts.append(f'<h3>Figures</h3><div class="figures">{"".join(figures)}</div>')
    if sweep.runs:
        parts.append(_runs(sweep.runs, comparison.metric))
    parts += [_environment(sweep.runs), _config(sweep), "</section>"]
    return "\n".join(parts)


def _figures(comparison: Comparison, prefix: str) -> list[str]:
    groups, metric = comparison.groups, comparison.metric
    figures: list[tuple[str, str, Figure | None]] = []
    if metric is not None:
        title = metric_title(metric)
        figures += [
            (
                f"{title} by method",
                "A dot for each seed, a line at the mean of several.",
                metric_by_arm(groups, metric),
            ),
            (
                f"{title} against trainable parameters",
                "A dot for each seed, a line through the means.",
                trade_off(groups, metric),
            ),
        ]
    for suffix, part in _by_budget(groups):
        figures.append((f"Training loss{suffix}", _curve_caption(part), training_loss(part)))
        if metric is not None:
            figures.append(
                (
                    f"Validation {metric_title(metric)} while training{suffix}",
                    _curve_caption(part),
                    validation_curve(part, metric),
                )
            )
    for group in groups:
        figures.append(
            (
                f"What {group.label} trains",
                "Share of the adapter's entries that the mask selects, by layer and module"
                f"{_over_seeds(group)}.",
                density_figure(t for run in group.finished for t in run.mask_density),
            )
        )
    seen: list[list[object]] = []
    for group in groups:
        histograms: list[object] = [run.score_histograms for run in group.finished]
        # Arms and budgets that select by the same scores share a figure.
        if histograms in seen:
            continue
        seen.append(histograms)
        figures.append(
            (
                f"Fisher scores of {group.label}",
                "Entries by score on a logarithmic axis, one line a seed.",
                score_distribution(group),
            )
        )
    return [
        f"<figure><figcaption><b>{escape(title)}</b><br>{escape(caption)}</figcaption>"
        f"{to_svg(figure, f'{prefix}f{position}', f'{title}. {caption}')}</figure>"
        for position, (title, caption, figure) in enumerate(figures)
        if figure is not None
    ]


def _by_budget(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    """The groups of each budget, with those that have none beside them."""
    ratios = list(dict.fromkeys(group.ratio for group in groups if group.ratio is not None))
    if len(ratios) < 2:
        return [("", list(groups))]
    return [
        (f" at {percent(ratio)}", [group for group in groups if group.ratio in (None, ratio)])
        for ratio in ratios
    ]


def _curve_caption(groups: Iterable[Group]) -> str:
    several = any(len(group.finished) > 1 for group in groups)
    return "A thin line for each seed, a thick one for their mean." if several else "One seed."


def _over_seeds(group: Group) -> str:
    count = len(group.finished)
    return f", mean over {count} seeds" if count > 1 else ""


def _runs(runs: Sequence[Run], metric: str | None) -> str:
    columns: list[tuple[str, Callable[[Run], str]]] = [
        ("Run", lambda run: run.run_id),
        ("Method", lambda run: run.arm),
        ("Budget", lambda run: MISSING if run.ratio is None else percent(run.ratio)),
        ("Seed", lambda run: str(run.seed)),
        ("Status", lambda run: run.status),
        (metric_title(metric), lambda run: _number(run.metrics.get(metric or ""), "{:.4f}")),
        ("Budgeted params", lambda run: _number(run.budget, "{:,}")),
        ("Trainable params", lambda run: _number(run.trainable_params, "{:,}")),
        ("Changed params", lambda run: _number(run.changed_params, "{:,}")),
        ("Total params", lambda run: _number(run.total_params, "{:,}")),
        ("Scoring (s)", lambda run: _number(run.score_seconds, "{:,.1f}")),
        ("Training (s)", lambda run: _number(run.train_seconds, "{:,.1f}")),
        ("Adapter file (bytes)", lambda run: _number(run.adapter_bytes, "{:,}")),
        ("Adapter", lambda run: run.adapter or MISSING),
    ]
    rows = [[show(run) for _, show in columns] for run in runs]
    table = _table_of([name for name, _ in columns], rows)
    return f"<details><summary>All {len(runs)} runs</summary>{table}</details>"


def _environment(runs: Sequence[Run]) -> str:
    """Commit, hardware and versions; several values where runs differ."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        facts = {"commit": run.commit, **run.hardware, **run.versions}
        for name, value in facts.items():
            if value is not None:
                found.setdefault(name, {})[str(value)] = None
    if not found:
        return ""
    items = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(' / '.join(values))}</dd>"
        for name, values in found.items()
    )
    return f"<details><summary>Commit, hardware and versions</summary><dl>{items}</dl></details>"


def _config(sweep: Results) -> str:
    text = json.dumps(sweep.config, indent=2, ensure_ascii=False, default=str)
    return f"<details><summary>Resolved config</summary><pre>{escape(text)}</pre></details>"


def _table_of(headers: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    return _table(headers, [f"<tr>{_cells(row)}</tr>" for row in rows])


def _table(headers: Iterable[str], lines: Iterable[str]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in headers)
    # Focusable, so that it can be scrolled with the keyboard.
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cells(values: Iterable[str]) -> str:
    return "".join(f"<td>{escape(value)}</td>" for value in values)


def _number(value: float | None, form: str) -> str:
    return MISSING if value is None else form.format(value)
