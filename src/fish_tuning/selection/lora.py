"""LoRA's pairs: what their tensors are called, and selecting from them by rank or by feature."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fish_tuning.selection.ranking import Tie, highest

LORA_SIDE = re.compile(r"(?:^|\.)lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.|$)")


def side_of(name: str) -> str:
    """Of a parameter's name: "A" or "B" of a LoRA pair, or ""."""
    match = LORA_SIDE.search(name)
    return match["side"] if match else ""


def kind_of(name: str) -> str:
    """As `side_of`, embeddings told apart: there A starts at zero, and their scores differ."""
    match = LORA_SIDE.search(name)
    return (match["embedding"] or "") + match["side"] if match else ""


def opposite_side(name: str) -> str:
    """The name of a LoRA pair's other tensor."""
    match = LORA_SIDE.search(name)
    assert match is not None
    return (
        name[: match.start("side")]
        + ("A" if match["side"] == "B" else "B")
        + name[match.end("side") :]
    )


def select_ranks(
    scores: Mapping[str, Tensor], k: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tie]:
    """As `highest`, with LoRA's ranks as a whole."""
    shared = {**scores, **_rank_worths(scores, dtype)}
    masks, (worth, tied, taken) = highest(shared, k, dtype)
    if taken in (0, tied):
        return masks, (worth, tied, taken)
    # The last rank has more entries than are left. A's alone would have no gradient.
    at_worth = {name: shared[name].to(dtype) == worth for name in scores}
    masks = {name: masks[name] & ~at_worth[name] for name in scores}
    tie = (worth, 0, 0)
    for side in ("B", "", "A"):
        last = {n: s.to(dtype) for n, s in scores.items() if side_of(n) == side}
        of_side = sum(int(at_worth[name].sum()) for name in last)
        quota = min(taken, of_side)
        if not quota:
            continue
        own = {name: last[name].masked_fill(~at_worth[name], -math.inf) for name in last}
        selected, tie = highest(own, quota, dtype)
        masks |= {name: masks[name] | selected[name] for name in last}
        taken -= quota
    return masks, tie


def _rank_worths(scores: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Each entry's score replaced by what its rank is worth, where both sides of a pair are there.

    A is (r, ...) and B (out, r, ...).
    """
    worths = {}
    for name, a in scores.items():
        other = opposite_side(name) if side_of(name) == "A" else ""
        if other not in scores or min(a.dim(), scores[other].dim()) < 2:
            continue
        b = scores[other].transpose(0, 1)
        if len(a) != len(b):
            continue
        zero_at_start = a if "lora_embedding_" in name else b
        total = zero_at_start.flatten(1).sum(1, dtype=torch.float64)
        worth = (total / (a[0].numel() + b[0].numel())).to(dtype)
        of_a = worth.to(a.device).reshape(-1, *[1] * (a.dim() - 1))
        of_b = worth.to(b.device).reshape(-1, *[1] * (b.dim() - 1))
        worths[name], worths[other] = of_a.expand_as(a), of_b.expand_as(b).transpose(0, 1)
    return worths


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
