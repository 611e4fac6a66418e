"""Ranks of LoRA-FISH-ranks: an ordinary LoRA, with a rank for each module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fish_tuning.experiments.models.adapters import SCALING
from fish_tuning.names import kind_of
from fish_tuning.selection.ranks import create_ranks_from_fisher


def choose_ranks(scores: Mapping[str, Tensor], budget: int) -> dict[str, Any]:
    """Choose a rank for each module, for a budget that includes the head.

    How many parameters the LoRA gets depends on the shapes of the tensors alone, not on the scores.

    Args:
        scores: Fisher information of a LoRA and of what is trained beside it.
        budget: Parameters to train in total.

    Returns:
        Arguments of `peft.LoraConfig`.

    Raises:
        ValueError: The budget has no room for a single rank, or the scores are all 0 or not finite.
    """
    dense = sum(score.numel() for name, score in scores.items() if not kind_of(name))
    if budget <= dense:
        raise ValueError(f"{dense:,} are trained without an adapter, and nothing is left for LoRA")
    of_lora = {name: score for name, score in scores.items() if kind_of(name)}
    return create_ranks_from_fisher(of_lora, budget - dense, scaling=SCALING)
