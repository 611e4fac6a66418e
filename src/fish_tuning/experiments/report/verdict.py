"""What a sweep shows, in words: what is ahead of what, by how much, and how sure that is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

from fish_tuning.experiments.arms import CRITERIA
from fish_tuning.experiments.config.selection import ORIGINAL_LORA
from fish_tuning.experiments.metrics.names import greater_is_better
from fish_tuning.experiments.report.arm_runs import ArmRuns, baseline_of
from fish_tuning.experiments.report.comparison import (
    ArmSummary,
    Comparison,
    PooledArm,
    SearchSummary,
)
from fish_tuning.experiments.report.statistics import Difference, paired_difference
from fish_tuning.experiments.report.summary_table import metric_title

_FISH, _RANDOM, _REVERSED = CRITERIA

FEW_SEEDS = 6
"""With fewer, seeds that all favor one arm do so by chance more often than in 1 of 20 sweeps."""


@dataclass(frozen=True)
class Finding:
    """A sentence of the verdict, or the start of one that its items complete."""

    text: str
    items: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.text} {'; '.join(self.items)}." if self.items else self.text


@dataclass(frozen=True)
class _Contest:
    """An arm against another one; `sign` is -1 if lower is better."""

    arm: str
    difference: Difference
    sign: int

    @property
    def outcome(self) -> str:
        """Whether the interval is above 0 ("ahead"), below ("behind"), or holds it ("unclear")."""
        if self.difference.interval is None:
            return "unclear"
        low, high = sorted(self.sign * bound for bound in self.difference.interval)
        return "ahead" if low > 0 else "behind" if high < 0 else "unclear"

    def __str__(self) -> str:
        mean, interval = self.difference.mean, self.difference.interval
        if interval is None:
            return f"{self.arm} ({mean:+.4f}, no interval)"
        if mean == 0 == interval[0] == interval[1]:
            return f"{self.arm} (the same with every seed)"
        if self.outcome == "unclear":
            return f"{self.arm} ({mean:+.4f}, interval {interval[0]:+.4f} to {interval[1]:+.4f})"
        low, high = sorted(abs(bound) for bound in interval)
        return f"{self.arm} by {abs(mean):.4f} (interval {low:.4f} to {high:.4f})"


def verdict(comparison: Comparison) -> list[Finding]:
    """Sum up a sweep in a few sentences, the most important one first.

    Arms are compared with the baseline, or if there is none with the best arm, and FISH also with
    random and reversed selection at the same budget.
    """
    metric = comparison.metric
    known = [arm for arm in comparison.arms if arm.metric is not None]
    if metric is None or not known:
        return [Finding("No run has a metric yet.")]
    sign = 1 if greater_is_better(metric) else -1
    best = max(known, key=lambda arm: sign * _mean(arm))
    findings = [_headline(metric, sign, best, known)]
    against = ORIGINAL_LORA if any(arm.is_baseline for arm in known) else best.label
    contests = {against: _against(best, known, metric, sign)}
    # If a control is the best arm, FISH has been compared with it already, as all arms have.
    for control, of_control in _controls([arm.runs for arm in known], metric, sign).items():
        contests.setdefault(control, of_control)
    counts = {len(c.difference.seeds) for of_other in contests.values() for c in of_other}
    if counts == {1}:
        return [*findings, _ONE_SEED]
    for other, of_other in contests.items():
        findings += _findings(of_other, other)
    return [*findings, *_certainty(counts)]


def pooled_verdict(pooled: Sequence[PooledArm], metric: str) -> list[Finding]:
    """Sum up several sweeps, which all have the same weight.

    Args:
        pooled: The arms over all sweeps.
        metric: The metric of one of them; all are better in the same direction.
    """
    sign = 1 if greater_is_better(metric) else -1
    others = [arm for arm in pooled if not arm.is_baseline]
    contests = [_Contest(arm.label, arm.difference, sign) for arm in others if arm.difference]
    return _findings(contests, ORIGINAL_LORA)


def search_verdict(searched: Iterable[SearchSummary]) -> list[Finding]:
    """Say for which arms the best learning rate may be beyond those that were tried."""
    at: dict[str, list[str]] = {"highest": [], "lowest": []}
    for arm in searched:
        rates = sorted(arm.metric)
        if len(rates) > 1 and arm.chosen in (rates[0], rates[-1]):
            edge = "highest" if arm.chosen == rates[-1] else "lowest"
            at[edge].append(f"{arm.label} ({arm.chosen:g})")
    return [
        Finding(
            f"The search chose the {edge} learning rate that it tried, and a "
            f"{edge.removesuffix('est')}er one may be better:",
            tuple(arms),
        )
        for edge, arms in at.items()
        if arms
    ]


def _mean(arm: ArmSummary) -> float:
    assert arm.metric is not None
    return arm.metric.mean


def _headline(metric: str, sign: int, best: ArmSummary, known: Sequence[ArmSummary]) -> Finding:
    assert best.metric is not None
    count, shown = best.metric.count, f"{_mean(best):.4f}"
    equal = [
        arm
        for arm in known
        if arm.metric and f"{_mean(arm):.4f}" == shown and arm.metric.count == count
    ]
    *others, last = [arm.label for arm in equal]
    text = f"{', '.join(others)} and {last} share" if others else f"{best.label} has"
    text += (
        f" the {'highest' if sign > 0 else 'lowest'} {metric_title(metric)}: "
        f"{shown} {f'on average over {count} seeds' if count > 1 else 'with one seed'}"
    )
    baseline = next((arm for arm in known if arm.is_baseline and arm not in equal), None)
    if baseline is not None:
        text += f"; {ORIGINAL_LORA} has {_mean(baseline):.4f}"
    return Finding(f"{text}.")


def _against(
    best: ArmSummary, known: Sequence[ArmSummary], metric: str, sign: int
) -> list[_Contest]:
    """Every arm against the baseline, or against the best arm if there is no baseline."""
    if any(arm.is_baseline for arm in known):
        return [_Contest(arm.label, arm.difference, sign) for arm in known if arm.difference]
    reference = best.runs.by_seed(metric)
    others = [arm for arm in known if arm is not best]
    found = [(arm, paired_difference(arm.runs.by_seed(metric), reference)) for arm in others]
    return [_Contest(arm.label, difference, sign) for arm, difference in found if difference]


def _controls(groups: Sequence[ArmRuns], metric: str, sign: int) -> dict[str, list[_Contest]]:
    """FISH against selections that ignore or invert Fisher information, at the same budget."""
    contests: dict[str, list[_Contest]] = {}
    for group in groups:
        for arm in (_RANDOM, _REVERSED) if group.arm == _FISH else ():
            other = baseline_of(group, groups, arm)
            if other is None or other.ratio != group.ratio:
                continue
            difference = paired_difference(group.by_seed(metric), other.by_seed(metric))
            if difference is not None:
                contest = _Contest(group.label, difference, sign)
                contests.setdefault(arm, []).append(contest)
    return contests


def _findings(contests: Iterable[_Contest], other: str) -> list[Finding]:
    texts: dict[str, list[str]] = {"ahead": [], "behind": [], "unclear": []}
    for contest in contests:
        texts[contest.outcome].append(str(contest))
    starts = {
        "ahead": f"Ahead of {other}:",
        "behind": f"Behind {other}:",
        "unclear": f"No clear difference from {other}:",
    }
    return [Finding(starts[key], tuple(of_key)) for key, of_key in texts.items() if of_key]


_ONE_SEED = Finding(
    "How sure: not at all. Arms that share one seed have no interval, so these runs cannot tell a "
    "difference from chance. Add seeds, such as --set 'seeds=[1, 2, 3, 4, 5, 6]'."
)


def _certainty(counts: Set[int]) -> list[Finding]:
    counts = counts - {1}  # They have no interval, and their findings say so.
    if not counts:
        return []
    fewest = min(counts)
    text = f"How sure: these are 95% intervals of the mean paired difference over {fewest}"
    text += f" to {max(counts)} seeds" if len(counts) > 1 else " seeds"
    if fewest < FEW_SEEDS:
        text += (
            f", which is few: even if two arms were equally good, {fewest} seeds would all favor "
            f"the same one in 1 of {2 ** (fewest - 1)} sweeps"
        )
    return [Finding(f"{text}.")]
