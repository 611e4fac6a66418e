"""Selecting from LoRA's pairs by feature."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fish_tuning.names import side_of
from fish_tuning.selection.ranking import Tie, highest


def select_features(
    scores: Mapping[str, Tensor], k: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tie]:
    """As `highest`, of one tensor, with LoRA's entries dealt out by feature.

    Scores cannot tell the ranks apart: with B drawn at random, E[F_A[j, m]] is the same for all
    ranks j (see `score_with_perturbed_b`), so the highest entries of A are a few columns in all
    ranks, one feature many times over. Here rank j gets the features at positions j, j + r,
    j + 2r, ... of their order; once each feature has one entry, the ranks move on by one.
    """
    ((name, tensor),) = scores.items()
    side = side_of(name)
    if not side or tensor.dim() < 2:
        return highest(scores, k, dtype)
    by_rank = (tensor if side == "A" else tensor.transpose(0, 1)).flatten(1)
    ranks, features = by_rank.shape
    worth, order = by_rank.sum(0, dtype=torch.float64).sort(descending=True, stable=True)
    position = torch.empty_like(order)
    position[order] = torch.arange(features, device=order.device)
    rank = torch.arange(ranks, device=order.device).unsqueeze(1)
    turn = (rank - position) % ranks
    whole, left = divmod(k, features)
    chosen = (turn < whole) | ((turn == whole) & (position < left))
    tie = (0.0, 0, 0)
    if left:
        at_last = worth == worth[left - 1]
        tie = (float(worth[left - 1]), int(at_last.sum()), int(at_last[:left].sum()))
    shape = tensor.shape if side == "A" else tensor.transpose(0, 1).shape
    mask = chosen.view(shape)
    return {name: mask if side == "A" else mask.transpose(0, 1).contiguous()}, tie
