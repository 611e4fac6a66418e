"""What each arm is, and which weights the metrics are of, in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fish_tuning.config import Criterion
from fish_tuning.experiments.arms import CRITERIA, LORA_FA
from fish_tuning.experiments.config.schema import ExperimentConfig
from fish_tuning.experiments.config.selection import FISH_RANKS, ORIGINAL_LORA
from fish_tuning.experiments.report.arm_runs import ArmRuns, percent
from fish_tuning.experiments.report.summary_table import metric_title
from fish_tuning.experiments.results import Run

_RANKED: dict[Criterion, str] = {
    "fisher": "with the most Fisher information",
    "reversed": "with the least Fisher information",
    "random": "drawn at random",
    "magnitude": "with the largest weights",
}


def explain_arms(groups: Sequence[ArmRuns], config: ExperimentConfig | None) -> dict[str, str]:
    """Explain each arm of a sweep in a sentence.

    Args:
        groups: The runs of each arm and budget.
        config: The sweep's config, if it is known.

    Returns:
        The sentences by arm.
    """
    ratios: dict[str, list[float]] = {}
    for group in groups:
        ratios.setdefault(group.arm, []).extend([] if group.ratio is None else [group.ratio])
    return {arm: _explain(arm, of_arm, config) for arm, of_arm in ratios.items()}


def _explain(arm: str, ratios: Sequence[float], config: ExperimentConfig | None) -> str:
    baseline, fish = (
        (f" of rank {config.lora.baseline_rank}", f" of rank {config.lora.fish_rank}")
        if config
        else ("", "")
    )
    budgets = ", ".join(percent(ratio) for ratio in sorted(set(ratios), reverse=True))
    share = f": {budgets} of {ORIGINAL_LORA}'s number" if budgets else ""
    if arm in CRITERIA:
        return f"LoRA{fish}; only entries {_RANKED[CRITERIA[arm]]} are trained{share}."
    if arm == ORIGINAL_LORA:
        return f"LoRA{baseline}, all of it trained: what the others are compared with."
    if arm == "LoRA (FISH rank)":
        return f"LoRA{fish}, all of it trained: what the masks select from."
    if arm == LORA_FA:
        return f"LoRA{fish} of which only B is trained."
    if arm == FISH_RANKS:
        return f"LoRA with a rank per module that Fisher information chooses, all trained{share}."
    for variant in config.fish_tuning.variants if config else []:
        if variant.name == arm:
            pool = f"{variant.adapter.method} adapter" if variant.adapter else f"LoRA{fish}"
            pool = pool if variant.own_weights is None else "The model's own weights"
            rule = f" With {_settings(variant.rule)}." if variant.rule else ""
            return f"{pool}; only entries {_RANKED[variant.criterion]} are trained{share}.{rule}"
    for peer in config.peers if config else []:
        if peer.label == arm:
            settings = f" with {_settings(peer.config)}" if peer.config else ""
            return f"PEFT's {peer.method}{settings}, all of it trained."
    return f"An arm of its own{share}."


def _settings(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in settings.items())


def explain_checkpoint(runs: Sequence[Run], config: ExperimentConfig | None) -> str:
    """Say which weights a sweep's metrics are of; empty if that is not known."""
    known = [run.evaluated for run in runs if run.evaluated is not None]
    if known:
        best = {metric_title(of.best_by) for of in known if of.best_by is not None}
        steps = sorted({of.step for of in known})
    elif config is not None and any(run.status == "finished" for run in runs):
        args = config.training_args
        chosen = str(args.get("metric_for_best_model") or runs[0].main_metric or "eval_loss")
        best = {metric_title(chosen)} if args.get("load_best_model_at_end") else set()
        steps = []
    else:
        return ""
    span = f" (step {steps[0]}{f' to {steps[-1]}' if len(steps) > 1 else ''})" if steps else ""
    if not best:
        return f"Metrics are those of the weights after the last step{span}."
    by = ", ".join(sorted(best))
    return (
        f"Metrics are those of each run's checkpoint with the best {by}{span}. "
        "It was chosen on the same validation data, so the numbers are slightly too good, for all "
        "arms alike."
    )
