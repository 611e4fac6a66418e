"""Exact parameter counts of every arm, from the model's config.json alone."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fish_tuning.experiments.arms import Arm, ArmKey, baseline, planned
from fish_tuning.experiments.config.schema import ExperimentConfig
from fish_tuning.experiments.config.selection import ORIGINAL_LORA
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.models.adapters import adapted_without_weights, trainable_tensors
from fish_tuning.experiments.models.ranks import choose_ranks
from fish_tuning.selection.budget import pool_and_quota
from fish_tuning.sparse.checks import check_gradients_unused

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParameterCounts:
    """The number of parameters of an arm's model.

    Attributes:
        trainable: Trainable parameters, head included.
        total: All parameters. PEFT also keeps an untrained copy of the head, which is not counted.
    """

    trainable: int
    total: int


def count_parameters(config: ExperimentConfig, num_labels: int) -> dict[ArmKey, ParameterCounts]:
    """Count the parameters of every arm at every budget, without loading weights.

    Args:
        config: The experiment.
        num_labels: Number of the head's outputs.

    Raises:
        ConfigError: The model or an adapter cannot be built, or a budget cannot be met.
    """
    lora = _counts_of(adapted_without_weights(config, baseline(config), num_labels))
    pools: dict[str, nn.Module] = {}  # models that masked arms select from
    counts = {}
    for key, arm in {arm.key: arm for arm in planned(config)}.items():
        if arm.criterion is not None:
            pool = arm.name if arm.has_own_pool else ""
            if pool not in pools:
                pools[pool] = adapted_without_weights(config, arm, num_labels)
            budget = _checked_budget(config, arm, lora, pools[pool])
            counts[key] = ParameterCounts(budget, _counts_of(pools[pool]).total)
        elif arm.chooses_ranks:
            counts[key] = _counts_of_ranks(config, arm, lora, num_labels)
        elif arm.name == ORIGINAL_LORA:
            counts[key] = lora
        else:
            counts[key] = _counts_of(adapted_without_weights(config, arm, num_labels))
    return counts


def names_left_dense(
    config: ExperimentConfig, entries: Mapping[str, int], budget: int
) -> list[str]:
    """Patterns of the tensors that a masked arm trains densely: those of `lora.names_to_exclude`.

    Empty if these tensors alone exceed the budget: then the head's entries compete with the
    adapter's. RoBERTa's two-layer head, for example, is larger than half of a small adapter.

    Args:
        config: The experiment.
        entries: Number of entries of each trainable tensor.
        budget: Number of parameters to train, head included.
    """
    names = [n for n in entries if any(re.search(p, n) for p in config.dense_names)]
    dense = sum(entries[name] for name in names)
    return [f"^{re.escape(name)}$" for name in names] if dense < budget else []


def _checked_budget(
    config: ExperimentConfig, arm: Arm, lora: ParameterCounts, model: nn.Module
) -> int:
    """The number of parameters that a masked arm trains, checked against what it selects from.

    Args:
        config: The experiment.
        arm: A masked arm.
        lora: Counts of the baseline.
        model: The model with the adapter that the arm selects from.
    """
    budget = _budget(arm, lora)
    entries = {name: tensor.numel() for name, tensor in trainable_tensors(model).items()}
    excluded = names_left_dense(config, entries, budget)
    if config.dense_names and not excluded:
        found = any(re.search(p, name) for p in config.dense_names for name in entries)
        logger.warning(
            "lora.names_to_exclude: %s match %s, so the head competes for the budget too",
            config.dense_names,
            f"more entries than the budget of {budget:,}"
            if found
            else "none of the trainable tensors",
        )
    try:
        pool, _ = pool_and_quota(entries, None, excluded, budget)
    except ValueError as error:
        source = f"lora.fish_rank {config.lora.fish_rank}"
        if arm.has_own_pool:
            source = f"{arm.name}'s {'adapter' if arm.adapter else 'own_weights'}"
        problem = f"{source} and lora.names_to_exclude do not allow: {error}"
        raise _budget_error(config, arm, budget, problem) from None
    try:
        check_gradients_unused(model, entries, pool)
    except ValueError as error:
        raise ConfigError(f"{arm.config_key}: {error}") from None
    return budget


def _counts_of_ranks(
    config: ExperimentConfig, arm: Arm, lora: ParameterCounts, num_labels: int
) -> ParameterCounts:
    """Count the parameters of a LoRA with chosen ranks; any scores give the same number."""
    budget = _budget(arm, lora)
    tensors = trainable_tensors(adapted_without_weights(config, arm, num_labels))
    scores = {name: torch.ones(tensor.shape) for name, tensor in tensors.items()}
    try:
        ranks = choose_ranks(scores, budget)
    except ValueError as error:
        raise _budget_error(config, arm, budget, f"{arm.name} cannot meet: {error}") from None
    return _counts_of(adapted_without_weights(config, arm, num_labels, ranks=ranks))


def _budget(arm: Arm, lora: ParameterCounts) -> int:
    assert arm.ratio is not None
    return round(arm.ratio * lora.trainable)


def _budget_error(config: ExperimentConfig, arm: Arm, budget: int, problem: str) -> ConfigError:
    key = "budgets" if config.fish_tuning.budgets else "prune_to_ratio_of_baseline"
    return ConfigError(
        f"fish_tuning.{key}: {arm.ratio:g} of the baseline is {budget:,} parameters, which "
        f"{problem}"
    )


def _counts_of(model: nn.Module) -> ParameterCounts:
    return ParameterCounts(
        sum(tensor.numel() for tensor in trainable_tensors(model).values()),
        sum(p.numel() for name, p in model.named_parameters() if ".original_module." not in name),
    )
