"""The report's tables: which columns they have, and how numbers are written in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fish_tuning.experiments.config.selection import ORIGINAL_LORA
from fish_tuning.experiments.metrics.names import KNOWN_METRICS
from fish_tuning.experiments.report.arm_runs import percent
from fish_tuning.experiments.report.comparison import (
    ArmSummary,
    Comparison,
    PooledArm,
    SearchSummary,
)
from fish_tuning.experiments.report.statistics import Difference, Spread
from fish_tuning.experiments.results import Evaluated, Run
from fish_tuning.experiments.tables import MISSING, Table


def comparison_table(comparison: Comparison) -> Table:
    """The arms of a sweep: one row per arm and budget."""
    columns: dict[str, Callable[[ArmSummary], str]] = {
        "Method": lambda arm: arm.label,
        f"Val {metric_title(comparison.metric)}": lambda arm: format_spread(arm.metric, "{:.4f}"),
        f"Difference to {ORIGINAL_LORA}": _difference,
        "Seeds": _seeds,
        "Final Trainable Params": lambda arm: format_spread(arm.trainable_params, "{:,.0f}"),
        "Learning Rate": _learning_rates,
        **_further_columns(comparison.arms),
        "Train Time (s)": lambda arm: format_spread(arm.train_seconds, "{:,.1f}"),
        "Peak Memory (MiB)": lambda arm: format_spread(arm.peak_memory_mib, "{:,.0f}"),
    }
    if not any(arm.is_baseline for arm in comparison.arms):
        del columns[f"Difference to {ORIGINAL_LORA}"]
    if not any(arm.learning_rates for arm in comparison.arms):
        del columns["Learning Rate"]
    return Table.of(comparison.arms, columns)


def _further_columns(arms: Sequence[ArmSummary]) -> dict[str, Callable[[ArmSummary], str]]:
    """The further metrics of language models."""
    names = dict.fromkeys(name for arm in arms for name in arm.further)
    return {_further_title(name): _further(name) for name in names if not _of_set(name, arms)}


def _of_set(name: str, arms: Sequence[ArmSummary]) -> bool:
    """Whether a metric is of a further evaluation set."""
    sets = {of_set for arm in arms for of_set in arm.forgetting}
    return any(name in (f"{of_set}_loss", f"{of_set}_perplexity") for of_set in sets)


def forgetting_table(comparison: Comparison) -> Table:
    """The metrics on further evaluation sets, before and after training: one row per arm."""
    arms = comparison.arms
    columns: dict[str, Callable[[ArmSummary], str]] = {}
    for of_set in dict.fromkeys(name for arm in arms for name in arm.forgetting):
        columns[f"{of_set}: Forgetting"] = _forgetting(of_set)
        for name in (f"{of_set}_loss", f"{of_set}_perplexity"):
            columns[_further_title(name)] = _further(name)
    if not columns:
        return Table((), ())
    return Table.of(arms, {"Method": lambda arm: arm.label, **columns})


def _forgetting(name: str) -> Callable[[ArmSummary], str]:
    return lambda arm: format_spread(arm.forgetting.get(name), "{:+.4f}")


def _further_title(name: str) -> str:
    """The heading of a further metric; that of an evaluation set begins with the set's name."""
    return f"Val {metric_title(name)}" if name in KNOWN_METRICS else metric_title(name)


def _further(name: str) -> Callable[[ArmSummary], str]:
    """Show a further metric; of evaluation sets, also what it was before training."""

    def show(arm: ArmSummary) -> str:
        after = format_spread(arm.further.get(name), "{:.4f}")
        before = arm.before.get(name)
        if name in KNOWN_METRICS or before is None:
            return after
        return f"{before.mean:.4f} → {after}"

    return show


def search_table(searches: Sequence[SearchSummary]) -> Table:
    """What a search for learning rates found: one row per arm and budget, one column per rate."""

    def column(rate: float) -> Callable[[SearchSummary], str]:
        def show(search: SearchSummary) -> str:
            metric = search.metric.get(rate)
            text = MISSING if metric is None else f"{metric.mean:.4f}"
            return f"{text} (chosen)" if rate == search.chosen else text

        return show

    rates = sorted({rate for search in searches for rate in search.metric})
    columns: dict[str, Callable[[SearchSummary], str]] = {"Method": lambda search: search.label}
    return Table.of(searches, columns | {f"{rate:g}": column(rate) for rate in rates})


def pooled_table(pooled: Sequence[PooledArm]) -> Table:
    """Arms over several sweeps: one row per arm and budget."""
    return Table.of(
        pooled,
        {
            "Method": lambda arm: arm.label,
            "Mean over experiments": lambda arm: format_number(arm.mean, "{:.4f}"),
            f"Difference to {ORIGINAL_LORA}": lambda arm: (
                "baseline" if arm.is_baseline else format_difference(arm.difference)
            ),
        },
    )


def overview_table(comparisons: Sequence[Comparison]) -> Table:
    """The main metric of several sweeps: one row per arm and budget, one column per sweep."""
    labels = dict.fromkeys(arm.label for comparison in comparisons for arm in comparison.arms)
    return Table(
        ("Method", *(f"{c.name}: {metric_title(c.metric)}" for c in comparisons)),
        tuple(
            (label, *(format_spread(c.metric_of(label), "{:.4f}") for c in comparisons))
            for label in labels
        ),
    )


def run_table(runs: Sequence[Run], metric: str | None) -> Table:
    """The runs of a sweep: one row per run."""
    return Table.of(
        runs,
        {
            "Run": lambda run: run.run_id,
            "Method": lambda run: run.arm,
            "Budget": lambda run: MISSING if run.ratio is None else percent(run.ratio),
            "Seed": lambda run: str(run.seed),
            "Status": lambda run: run.status,
            metric_title(metric): lambda run: format_number(
                run.metrics.get(metric or ""), "{:.4f}"
            ),
            "Budgeted params": lambda run: format_number(run.budget, "{:,}"),
            "Trainable params": lambda run: format_number(run.trainable_params, "{:,}"),
            "Changed params": lambda run: format_number(run.changed_params, "{:,}"),
            "Total params": lambda run: format_number(run.total_params, "{:,}"),
            "Scoring (s)": lambda run: format_number(run.score_seconds, "{:,.1f}"),
            "Training (s)": lambda run: format_number(run.train_seconds, "{:,.1f}"),
            "Metrics of": lambda run: MISSING if run.evaluated is None else _weights(run.evaluated),
            "Adapter file (bytes)": lambda run: format_number(run.adapter_bytes, "{:,}"),
            "Adapter": lambda run: run.adapter or MISSING,
        },
    )


def _weights(evaluated: Evaluated) -> str:
    if evaluated.best_by is None:
        return f"last step, {evaluated.step:,}"
    return f"step {evaluated.step:,}, best {metric_title(evaluated.best_by)}"


def metric_title(metric: str | None) -> str:
    """A metric's name as the heading of a column."""
    if metric is None:
        return "Metric"
    short = {"f1": "F1", "f1_macro": "Macro F1", "mse": "MSE", "spearmanr": "Spearman"}
    short |= {"eval_loss": "Loss", "bleu": "BLEU", "rouge_l": "ROUGE-L"}
    for ending in ("_loss", "_perplexity"):
        # Of a further evaluation set, whose name stays as it is in the config.
        if metric.endswith(ending) and metric not in short:
            return f"{metric.removesuffix(ending)}: {ending[1:].title()}"
    return short.get(metric, metric.replace("_", " ").title())


def format_number(value: float | None, form: str) -> str:
    """Write a number, or that there is none."""
    return MISSING if value is None else form.format(value)


def format_spread(values: Spread | None, form: str) -> str:
    """Write mean ± standard deviation; for one value or equal counts, the value alone."""
    if values is None:
        return MISSING
    if values.std is None or (values.std == 0 and values.mean == int(values.mean)):
        return form.format(values.mean)
    return f"{form.format(values.mean)} ± {form.format(values.std).removeprefix('+')}"


def format_difference(difference: Difference | None) -> str:
    """Write mean difference and interval, or why there is no interval."""
    if difference is None:
        return MISSING
    if difference.interval is None:
        return f"{difference.mean:+.4f} (1 seed: no interval)"
    low, high = difference.interval
    return f"{difference.mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def _learning_rates(arm: ArmSummary) -> str:
    return ", ".join(f"{rate:g}" for rate in arm.learning_rates) or MISSING


def _seeds(arm: ArmSummary) -> str:
    finished = len(arm.runs.finished)
    failed = len(arm.runs.runs) - finished
    return f"{finished} ({failed} failed)" if failed else str(finished)


def _difference(arm: ArmSummary) -> str:
    if arm.is_baseline:
        return "baseline"
    text = format_difference(arm.difference)
    shared = len(arm.difference.seeds) if arm.difference else 0
    return f"{text} ({shared} seeds)" if 1 < shared < len(arm.runs.finished) else text
