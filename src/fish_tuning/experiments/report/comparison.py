"""The table that reports show: arms side by side, over seeds."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fish_tuning.experiments.config.schema import ORIGINAL_LORA
from fish_tuning.experiments.metrics import KNOWN_METRICS, greater_is_better
from fish_tuning.experiments.report.statistics import (
    RESAMPLES,
    Difference,
    Group,
    Spread,
    baseline_of,
    group_runs,
    paired_difference,
    pooled_difference,
    spread,
)
from fish_tuning.experiments.results import Results, Run

MISSING = "n/a"
OVER_ALL = "Over all experiments, each counting the same"
LEARNING_RATES = "Learning rates tried, by the main metric on held-out training examples"
_MIB = 2**20


@dataclass(frozen=True)
class Comparison:
    """A table as text, with what it needs to be understood.

    Cells come from files as they are: what shows them must escape them.
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    groups: tuple[Group, ...]
    metric: str | None

    @property
    def metric_cells(self) -> dict[str, str]:
        """The column of the main metric, by the first cell of each row."""
        column = self.headers.index(_metric_header(self.metric))
        return {row[0]: row[column] for row in self.rows}


@dataclass(frozen=True)
class _Published:
    """What was published with the original implementation for one of its experiments.

    `model` is a pattern of the name.
    """

    model: str
    dataset: str
    ratio: float
    accuracy: dict[str, str]
    note: str


_PUBLISHED = (
    _Published(
        r"bert-base-cased",
        "sst2",
        1.0,
        {
            ORIGINAL_LORA: "0.9048",
            "LoRA-FISH": "0.9094",
            "LoRA-FISH-rand": "0.9025",
            "LoRA-FISH-rev": "0.7443",
        },
        "Its LoRA-FISH is listed with 443,906 trainable parameters; its selection keeps all ties "
        "at score 0 and so trains 886,274.",
    ),
    _Published(
        r"tinyllama-1\.1b.*",
        "rottentomatoes",
        0.25,
        {ORIGINAL_LORA: "0.9006", "LoRA-FISH": "0.8856"},
        "",
    ),
    _Published(r"bert-tiny", "sst2", 0.5, {ORIGINAL_LORA: "0.5103", "LoRA-FISH": "0.5069"}, ""),
)


def learning_rate_table(
    results: Results,
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]] | None:
    """What a search for learning rates has seen: headers, and a row for each arm and budget.

    A cell is the mean of the main metric over the seeds, on the held-out examples; the one that
    was chosen is marked. None without a search.
    """
    metric = _main_metric(results.search)
    if metric is None:
        return None
    values = sorted({run.learning_rate for run in results.search if run.learning_rate is not None})
    chosen = {(run.arm, run.ratio): run.learning_rate for run in results.runs}
    rows = []
    for group in group_runs(results.search):
        cells = []
        for value in values:
            of_value = replace(
                group, runs=tuple(run for run in group.runs if run.learning_rate == value)
            )
            mean = spread(of_value.by_seed(metric).values())
            text = MISSING if mean is None else f"{mean.mean:.4f}"
            is_chosen = chosen.get((group.arm, group.ratio)) == value
            cells.append(f"{text} (chosen)" if is_chosen else text)
        rows.append((group.label, *cells))
    return ("Method", *(f"{value:g}" for value in values)), tuple(rows)


def pooled_table(
    comparisons: Sequence[Comparison],
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]] | None:
    """Arms over several sweeps, each sweep counting the same: headers, and a row for each.

    Shown are the arms and budgets that every sweep has, by the mean of its main metric. None for
    one sweep, or where no arm is in all.
    """
    by_label = [{group.label: group for group in c.groups} for c in comparisons]
    shared = [label for label in by_label[0] if all(label in groups for groups in by_label)]
    if len(comparisons) < 2 or not shared:
        return None
    rows = []
    for label in shared:
        arm, baselines, means = {}, {}, []
        for number, (comparison, groups) in enumerate(zip(comparisons, by_label, strict=True)):
            metric = comparison.metric or ""
            mean = spread(groups[label].by_seed(metric).values())
            means.append(math.nan if mean is None else mean.mean)
            baseline = baseline_of(groups[label], comparison.groups, ORIGINAL_LORA)
            arm[str(number)] = groups[label].by_seed(metric)
            baselines[str(number)] = baseline.by_seed(metric) if baseline else {}
        over_all = math.fsum(means) / len(means)
        difference = format_difference(pooled_difference(arm, baselines))
        rows.append(
            (
                label,
                f"{over_all:.4f}" if math.isfinite(over_all) else MISSING,
                "baseline" if groups[label].arm == ORIGINAL_LORA else difference,
            )
        )
    return ("Method", "Mean over experiments", f"Difference to {ORIGINAL_LORA}"), tuple(rows)


def shared_notes(comparisons: Iterable[Comparison]) -> list[str]:
    """The notes of several tables, each once."""
    return list(dict.fromkeys(note for comparison in comparisons for note in comparison.notes))


def compare(results: Results) -> Comparison:
    """Build the table of a sweep: one row for each arm and budget, in the order of the runs."""
    groups = group_runs(results.runs)
    metric = _main_metric(results.runs)
    published = _find_published(results) if metric == "accuracy" else None
    searched = any(run.learning_rate is not None for run in results.runs)
    headers = (
        "Method",
        "Train Time (s)",
        "Peak Memory (MiB)",
        "Final Trainable Params",
        *(["Learning Rate"] if searched else []),
        _metric_header(metric),
        "Seeds",
        f"Difference to {ORIGINAL_LORA}",
        *(["Published"] if published else []),
    )
    rows = tuple(
        (
            group.label,
            _cell(group, lambda run: run.train_seconds, "{:,.1f}"),
            _cell(group, lambda run: _mebibytes(run.peak_memory_bytes), "{:,.0f}"),
            _cell(group, lambda run: run.trainable_params, "{:,.0f}"),
            *([_learning_rate(group)] if searched else []),
            MISSING
            if metric is None
            else format_spread(spread(group.by_seed(metric).values()), "{:.4f}"),
            _seeds(group),
            _difference(group, groups, metric),
            *([_published_cell(published, group)] if published else []),
        )
        for group in groups
    )
    return Comparison(
        headers, rows, _notes(results.runs, groups, metric, published), tuple(groups), metric
    )


def metric_title(metric: str | None) -> str:
    """A metric's name as a column is headed."""
    if metric is None:
        return "Metric"
    short = {"f1": "F1", "f1_macro": "Macro F1", "mse": "MSE", "spearmanr": "Spearman"}
    return short.get(metric, metric.replace("_", " ").title())


def _metric_header(metric: str | None) -> str:
    return f"Val {metric_title(metric)}"


def format_spread(values: Spread | None, form: str) -> str:
    """Mean ± standard deviation; without the second for one value or equal counts."""
    if values is None:
        return MISSING
    if values.std is None or (values.std == 0 and values.mean == int(values.mean)):
        return form.format(values.mean)
    return f"{form.format(values.mean)} ± {form.format(values.std)}"


def format_difference(difference: Difference | None) -> str:
    """Mean difference and its interval, or why there is none."""
    if difference is None:
        return MISSING
    if difference.interval is None:
        return f"{difference.mean:+.4f} (1 seed: no interval)"
    low, high = difference.interval
    return f"{difference.mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def _main_metric(runs: Sequence[Run]) -> str | None:
    return next((run.main_metric for run in runs if run.main_metric is not None), None)


def _mebibytes(count: int | None) -> float | None:
    return None if count is None else count / _MIB


def _cell(group: Group, value: Callable[[Run], float | None], form: str) -> str:
    values = [found for run in group.finished if (found := value(run)) is not None]
    return format_spread(spread(values), form)


def _seeds(group: Group) -> str:
    failed = len(group.runs) - len(group.finished)
    return f"{len(group.finished)} ({failed} failed)" if failed else str(len(group.finished))


def _difference(group: Group, groups: Sequence[Group], metric: str | None) -> str:
    baseline = baseline_of(group, groups, ORIGINAL_LORA)
    if group.arm == ORIGINAL_LORA:
        return "baseline"
    if metric is None or baseline is None:
        return MISSING
    difference = paired_difference(group.by_seed(metric), baseline.by_seed(metric))
    text = format_difference(difference)
    if difference is not None and 1 < len(difference.seeds) < len(group.finished):
        text += f" ({len(difference.seeds)} seeds)"
    return text


def _learning_rate(group: Group) -> str:
    values = {run.learning_rate for run in group.runs if run.learning_rate is not None}
    return ", ".join(f"{value:g}" for value in sorted(values)) or MISSING


def _notes(
    runs: Sequence[Run],
    groups: Sequence[Group],
    metric: str | None,
    published: _Published | None,
) -> tuple[str, ...]:
    notes = [
        "Mean ± sample standard deviation over seeds. Train Time: wall clock of training, without "
        "evaluation, saving and scoring. Final Trainable Params: scalars that the optimizer held, "
        "head included."
    ]
    if any(run.learning_rate is not None for run in runs):
        notes.append(
            "Learning Rate: chosen for each method and budget on examples held out of the "
            "training data, before the runs of this table."
        )
    places = sorted({run.peak_memory_of for run in runs if run.peak_memory_of})
    if places:
        # A process keeps what earlier runs made it ask for.
        notes.append(f"Peak Memory: highest during training, of: {', '.join(places)}.")
    if metric in KNOWN_METRICS and not greater_is_better(metric):
        notes.append(f"{metric_title(metric)}: lower is better.")
    if any(group.arm == ORIGINAL_LORA for group in groups) and len(groups) > 1:
        notes.append(
            f"Difference: mean over the seeds that both have, seed by seed, with a 95% percentile "
            f"bootstrap interval ({RESAMPLES:,} resamples of the seeds, within each experiment "
            "where there are several). With few seeds the interval is too narrow."
        )
    if published:
        notes.append(
            "Published: validation accuracy that the original implementation reports, one seed; "
            f"its settings and versions may differ from ours. {published.note}".rstrip()
        )
    return tuple(notes)


def _find_published(results: Results) -> _Published | None:
    model = _plain(_nested(results.config, "model", "name")).lower()
    names = {_plain(_nested(results.config, "dataset", "name"))}
    load_args = _nested(results.config, "dataset", "load_args")
    if isinstance(load_args, list) and load_args:
        names.add(_plain(load_args[-1]))
    datasets = {re.sub(r"[-_]", "", name.lower()) for name in names}
    for published in _PUBLISHED:
        if re.fullmatch(published.model, model) and published.dataset in datasets:
            return published
    return None


def _published_cell(published: _Published, group: Group) -> str:
    if group.ratio is not None and group.arm != ORIGINAL_LORA and group.ratio != published.ratio:
        return MISSING
    return published.accuracy.get(group.arm, MISSING)


def _nested(config: dict[str, Any], section: str, key: str) -> Any:
    content = config.get(section)
    return content.get(key) if isinstance(content, dict) else None


def _plain(name: Any) -> str:
    """The last part of a hub id or a path."""
    return name.rstrip("/").rsplit("/", 1)[-1] if isinstance(name, str) else ""


def model_and_dataset(results: Results) -> tuple[str, str]:
    """What a sweep trained and on which data, as its config names them."""
    model = _nested(results.config, "model", "name")
    for key in ("name", "load_args", "path"):
        data = _nested(results.config, "dataset", key)
        if data:
            break
    if isinstance(data, list):
        data = "/".join(map(str, data))
    elif isinstance(data, dict):
        data = ", ".join(map(str, data.values()))
    return str(model or MISSING), str(data or MISSING)
