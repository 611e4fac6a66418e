"""How far two sets of scores agree: the overlap of their best entries, and their ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fish_tuning.arguments import check_scores
from fish_tuning.names import kind_of, layer_path
from fish_tuning.parts import whole
from fish_tuning.selection.ranking import highest

ALL = "all"


@dataclass(frozen=True)
class Agreement:
    """How far two sets of scores agree about some tensors.

    Attributes:
        layer: The path up to the first number, such as "bert.encoder.layer.0"; "all" for every
            layer together.
        side: LoRA's "A" or "B", or "" for tensors that are not LoRA's.
        num_entries: Number of entries.
        overlap: Fraction of the first scores' best entries that are among the second's too. Two
            random orders have the fraction `keep_ratio` in common.
        rank_correlation: Spearman's rank correlation over all entries; NaN if one of the two
            gives all entries the same score.
    """

    layer: str
    side: str
    num_entries: int
    overlap: float
    rank_correlation: float


def compare_scores(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], *, keep_ratio: float = 0.1
) -> list[Agreement]:
    """Compare two scorings of the same parameters, by layer and in total.

    LoRA's A and B are compared separately, because their scores differ in scale.

    Args:
        first: Parameter name to scores.
        second: Scores of the same parameters, such as from other examples or another estimator.
        keep_ratio: The best entries are this fraction of them, in (0, 1].

    Returns:
        An agreement per layer and side, after one over all layers per side.

    Raises:
        ValueError: The two have different parameters, or `keep_ratio` is out of range.

    Examples:
        >>> few = score_with_perturbed_b(model, loader, num_samples=4)
        >>> many = score_with_perturbed_b(model, loader)
        >>> overlap = compare_scores(few, many)[0].overlap
    """
    check_scores("first", first)
    check_scores("second", second)
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio={keep_ratio!r} is not in (0, 1]")
    differing = [
        name
        for name in dict.fromkeys([*first, *second])
        if name not in first or name not in second or first[name].shape != second[name].shape
    ]
    if differing:
        raise ValueError(
            f"the scores are of different parameters: {len(differing)} are missing in one of them "
            f"or differ in shape ({', '.join(differing[:3])}). Compare scores of one model with "
            "one adapter"
        )
    groups: dict[tuple[str, str], list[str]] = {}
    for name in first:
        for layer in (ALL, layer_path(name)):
            if first[name].numel():
                groups.setdefault((layer, kind_of(name)), []).append(name)
    order = sorted(groups, key=lambda group: group[0] != ALL)
    return [
        Agreement(layer, side, *_agreement(first, second, groups[layer, side], keep_ratio))
        for layer, side in order
    ]


def _agreement(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], names: list[str], keep_ratio: float
) -> tuple[int, float, float]:
    """Number of entries, overlap of the best of them, and rank correlation."""
    a, b = (
        torch.cat([whole(scores[name]).detach().reshape(-1).cpu().double() for name in names])
        for scores in (first, second)
    )
    k = max(1, round(keep_ratio * a.numel()))
    best_of_a, best_of_b = (highest({"": s}, k, torch.float64)[0][""] for s in (a, b))
    ranks = torch.stack([_ranks(a), _ranks(b)])
    correlation = torch.corrcoef(ranks)[0, 1] if ranks.shape[1] > 1 else torch.tensor(torch.nan)
    return a.numel(), int((best_of_a & best_of_b).sum()) / k, float(correlation)


def _ranks(scores: Tensor) -> Tensor:
    """The rank of every score; equal scores share the mean of their ranks."""
    _, position, counts = scores.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks: Tensor = (last - (counts - 1) / 2)[position]
    return ranks
