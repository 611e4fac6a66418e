"""A sweep in numbers: its arms side by side, summarized over their seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from fish_tuning.experiments.config.selection import ORIGINAL_LORA
from fish_tuning.experiments.metrics.names import greater_is_better
from fish_tuning.experiments.report.arm_runs import ArmRuns, baseline_of, group_runs
from fish_tuning.experiments.report.statistics import (
    Difference,
    Spread,
    paired_difference,
    pooled_difference,
    spread,
)
from fish_tuning.experiments.results import Results, Run
from fish_tuning.experiments.tables import MISSING

_MIB = 2**20


@dataclass(frozen=True)
class ArmSummary:
    """One arm at one budget over its seeds; None stands for what no run has recorded.

    Attributes:
        runs: Its runs.
        metric: The sweep's main metric.
        train_seconds: Wall clock of training.
        peak_memory_mib: Highest memory during training, in MiB.
        trainable_params: Scalars that the optimizer held.
        learning_rates: What a search has chosen for it; empty without a search.
        difference: Main metric minus the baseline's; None also for the baseline itself.
        further: Every other metric of a language model, by name.
        before: The metrics of a language model before training, by name.
        forgetting: How much the loss on each further evaluation set has grown, by the set's name.
    """

    runs: ArmRuns
    metric: Spread | None
    train_seconds: Spread | None
    peak_memory_mib: Spread | None
    trainable_params: Spread | None
    learning_rates: tuple[float, ...]
    difference: Difference | None
    further: Mapping[str, Spread | None]
    before: Mapping[str, Spread | None]
    forgetting: Mapping[str, Spread | None]

    @property
    def label(self) -> str:
        """Name of the arm, with its budget where the sweep has several."""
        return self.runs.label

    @property
    def is_baseline(self) -> bool:
        """Whether the others are compared with this arm."""
        return self.runs.arm == ORIGINAL_LORA


@dataclass(frozen=True)
class Comparison:
    """The arms of a sweep, in the order of its runs; `metric` is what they are compared by."""

    name: str
    metric: str | None
    arms: tuple[ArmSummary, ...]

    @property
    def groups(self) -> tuple[ArmRuns, ...]:
        """The runs of each arm and budget."""
        return tuple(arm.runs for arm in self.arms)

    def metric_of(self, label: str) -> Spread | None:
        """Return the main metric of an arm, or None if the sweep has no such arm."""
        return next((arm.metric for arm in self.arms if arm.label == label), None)


def compare(results: Results) -> Comparison:
    """Summarize a sweep: one entry per arm and budget."""
    metric = _main_metric(results.runs)
    groups = group_runs(results.runs)
    summaries = tuple(_summary(group, groups, metric) for group in groups)
    return Comparison(results.name, metric, summaries)


def _summary(group: ArmRuns, groups: Sequence[ArmRuns], metric: str | None) -> ArmSummary:
    def over_seeds(value: Callable[[Run], float | None]) -> Spread | None:
        return spread(found for run in group.finished if (found := value(run)) is not None)

    baseline = baseline_of(group, groups, ORIGINAL_LORA)
    difference = None
    if baseline is not None and group.arm != ORIGINAL_LORA:
        difference = paired_difference(group.by_seed(metric), baseline.by_seed(metric))
    rates = {run.learning_rate for run in group.runs if run.learning_rate is not None}
    return ArmSummary(
        runs=group,
        metric=spread(group.by_seed(metric).values()),
        train_seconds=over_seeds(lambda run: run.train_seconds),
        peak_memory_mib=over_seeds(
            lambda run: None if run.peak_memory_bytes is None else run.peak_memory_bytes / _MIB
        ),
        trainable_params=over_seeds(lambda run: run.trainable_params),
        learning_rates=tuple(sorted(rates)),
        difference=difference,
        further={name: over_seeds(_after(name)) for name in _further_metrics(groups, metric)},
        before={
            name: over_seeds(_before(name))
            for name in dict.fromkeys(name for run in group.finished for name in run.metrics_before)
        },
        forgetting={
            name.removesuffix("_loss"): over_seeds(_growth(name))
            for name in _further_metrics(groups, metric)
            if name.endswith("_loss") and name != "eval_loss"
        },
    )


def _after(name: str) -> Callable[[Run], float | None]:
    return lambda run: run.metrics.get(name)


def _before(name: str) -> Callable[[Run], float | None]:
    return lambda run: run.metrics_before.get(name)


def _growth(name: str) -> Callable[[Run], float | None]:
    def growth(run: Run) -> float | None:
        after, before = run.metrics.get(name), run.metrics_before.get(name)
        return None if after is None or before is None else after - before

    return growth


def _further_metrics(groups: Sequence[ArmRuns], main: str | None) -> list[str]:
    """The metrics of language models beside the main one; classification reports just that."""
    runs = [run for group in groups for run in group.finished if run.metrics_before]
    return [name for name in dict.fromkeys(n for run in runs for n in run.metrics) if name != main]


@dataclass(frozen=True)
class SearchSummary:
    """What a search for learning rates found for one arm and budget.

    Attributes:
        label: The arm, with its budget where there are several.
        metric: The main metric on the held-out examples by learning rate, over the seeds; None
            where all runs failed.
        chosen: The learning rate that the sweep's runs use.
    """

    label: str
    metric: dict[float, Spread | None]
    chosen: float | None


def summarize_search(results: Results) -> list[SearchSummary]:
    """Return what the search for learning rates found; empty without a search."""
    name = _main_metric(results.search)
    chosen = {(run.arm, run.ratio): run.learning_rate for run in results.runs}
    summaries = []
    for group in group_runs(results.search) if name else []:
        metric = {}
        for rate in sorted({run.learning_rate for run in group.runs if run.learning_rate}):
            tried = tuple(run for run in group.runs if run.learning_rate == rate)
            metric[rate] = spread(replace(group, runs=tried).by_seed(name).values())
        summaries.append(SearchSummary(group.label, metric, chosen.get((group.arm, group.ratio))))
    return summaries


@dataclass(frozen=True)
class PooledArm:
    """One arm and budget over several sweeps, which all have the same weight.

    Attributes:
        label: The arm, with its budget where there are several.
        is_baseline: Whether the others are compared with this arm.
        mean: Mean over sweeps of their main metric's mean; None if a sweep has none.
        difference: Main metric minus the baseline's.
    """

    label: str
    is_baseline: bool
    mean: float | None
    difference: Difference | None


def pool(comparisons: Sequence[Comparison]) -> list[PooledArm]:
    """Summarize several sweeps: one entry per arm and budget that all of them have.

    Returns:
        The entries; none for a single sweep, or if higher is better in some sweeps and lower in
        others.
    """
    directions = {c.metric is not None and greater_is_better(c.metric) for c in comparisons}
    if len(comparisons) < 2 or len(directions) > 1:
        return []
    by_label = [{arm.label: arm for arm in comparison.arms} for comparison in comparisons]
    pooled = []
    for label in by_label[0]:
        if not all(label in arms for arms in by_label):
            continue
        own, baselines = {}, {}
        for number, (comparison, arms) in enumerate(zip(comparisons, by_label, strict=True)):
            baseline = baseline_of(arms[label].runs, comparison.groups, ORIGINAL_LORA)
            own[str(number)] = arms[label].runs.by_seed(comparison.metric)
            baselines[str(number)] = baseline.by_seed(comparison.metric) if baseline else {}
        means = [arms[label].metric for arms in by_label]
        known = [metric.mean for metric in means if metric is not None]
        pooled.append(
            PooledArm(
                label,
                by_label[0][label].is_baseline,
                fmean(known) if len(known) == len(means) else None,
                pooled_difference(own, baselines),
            )
        )
    return pooled


def _main_metric(runs: Iterable[Run]) -> str | None:
    return next((run.main_metric for run in runs if run.main_metric is not None), None)


def model_and_dataset(results: Results) -> tuple[str, str]:
    """Name what a sweep trained and on which data, as its config does."""

    def section(name: str) -> dict[str, Any]:
        content = results.config.get(name)
        return content if isinstance(content, dict) else {}

    dataset = section("dataset")
    data = dataset.get("name") or dataset.get("load_args") or dataset.get("path")
    if isinstance(data, list):
        data = "/".join(map(str, data))
    elif isinstance(data, dict):
        data = ", ".join(map(str, data.values()))
    model = section("model").get("name")
    return str(model or MISSING), str(data or MISSING)
