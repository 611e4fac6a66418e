"""Selecting LoRA's entries by feature, in place of entry by entry."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fish_tuning.names import side_of
from fish_tuning.parts import Part
from fish_tuning.selection.ranking import Tie, highest


def select_features(
    scores: Mapping[str, Tensor], k: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tie]:
    """Like `highest`, but deals out the entries of a LoRA tensor feature by feature.

    A feature is a column of A or a row of B. Scores cannot tell the ranks apart: with B drawn at
    random, E[F_A[j, m]] is the same for all ranks j (see `score_with_perturbed_b`). The highest
    entries of A would therefore be a few columns in all ranks, the same features many times over.
    Here the features are sorted by their score, summed over the ranks, and rank j gets those at
    positions j, j + r, j + 2r, ... Once every feature has one entry, each rank continues with the
    features of the next rank.

    Args:
        scores: One tensor by name. If it is not a matrix of LoRA, `highest` selects from it.
        k: How many entries to select.
        dtype: What to rank the scores as, float32 or float64.

    Returns:
        As `highest`. The tied scores are those of features.
    """
    ((name, tensor),) = scores.items()
    side = side_of(name)
    if not side or tensor.dim() < 2 or not tensor.numel():
        return highest(scores, k, dtype)
    # The sum over the ranks takes all rows of A. A matrix of LoRA is small.
    part = Part(tensor)
    tensor = part.complete(part.local)
    by_rank = (tensor if side == "A" else tensor.transpose(0, 1)).flatten(1)
    ranks, features = by_rank.shape
    worth, order = by_rank.sum(0, dtype=torch.float64).sort(descending=True, stable=True)
    position = torch.empty_like(order)
    position[order] = torch.arange(features, device=order.device)
    rank = torch.arange(ranks, device=order.device).unsqueeze(1)
    turn = (rank - position) % ranks
    full_turns, left = divmod(k, features)
    chosen = (turn < full_turns) | ((turn == full_turns) & (position < left))
    tie = (0.0, 0, 0)
    if left:
        at_last = worth == worth[left - 1]
        tie = (float(worth[left - 1]), int(at_last.sum()), int(at_last[:left].sum()))
    if side == "A":
        mask = chosen.view(tensor.shape)
    else:
        mask = chosen.view(tensor.transpose(0, 1).shape).transpose(0, 1).contiguous()
    return {name: mask.to(part.mask_device)}, tie
