"""Scores and a budget -> a mask with exactly k selected entries."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from fish_tuning.arguments import check_scores
from fish_tuning.config import Scope
from fish_tuning.mask.mask import FishMask
from fish_tuning.parts import Part, totals
from fish_tuning.selection.budget import patterns_of, pool_and_quota
from fish_tuning.selection.features import select_features
from fish_tuning.selection.ranking import Tie, highest
from fish_tuning.selection.shares import shares_of

logger = logging.getLogger(__name__)


def create_mask_from_fisher(
    fisher_scores: Mapping[str, Tensor],
    keep_ratio: float | None = None,
    names_to_exclude: Sequence[str] | str | None = None,
    *,
    num_trainable: int | None = None,
    scope: Scope = "global",
    provenance: Mapping[str, Any] | None = None,
) -> FishMask:
    """Select exactly k entries, those with the highest scores (arXiv 2504.04050, equation 4).

    The scores can come from any criterion; FISH Mask (arXiv 2111.09839) and FISH-Tuning use the
    diagonal of the Fisher information. Equal scores are taken by position, in the order of sorted
    names and then of the flat index, so the same scores always give the same mask. A log message
    says when position decided; it is a warning if the equal scores are 0. The scores are neither
    sorted nor copied: apart from the mask, the memory needed does not grow with the pool (only a
    tensor that is not contiguous is copied while it is read).

    Scores that are divided among processes, those of a model that `fully_shard` has divided, stay
    where they are: the processes exchange counts, at most 2 KB per tensor and pass. All of them
    have to call, and get the mask that one process would select from the complete scores. It is
    complete in every process, on the CPU: one byte per entry.

    Args:
        fisher_scores: Parameter name to scores with the shape of the parameter: floating point,
            of any sign, on any device. The mask of a tensor is on the same device, unless its
            scores are divided.
        keep_ratio: Fraction of the pool to select, in (0, 1]. The pool is everything that
            `names_to_exclude` does not match; k is `max(1, round(keep_ratio * pool))`.
        names_to_exclude: Regular expressions to search for in the names. Tensors with a matching
            name are trained densely: they are all True in the mask and not part of the pool.
        num_trainable: Number of True entries in total, dense tensors included. Give either this
            or `keep_ratio`.
        scope: How the k entries are divided between tensors, see `Scope`.
        provenance: Values to record in the mask's provenance besides the arguments.

    Returns:
        The mask, with its tensors in the order of `fisher_scores`.

    Raises:
        ValueError: Scores are missing, not floating point or not finite, everything is excluded,
            a regular expression is invalid, the budget is not possible, or the scope is unknown.

    Examples:
        >>> scores = {"layer.weight": torch.tensor([[1.0, 3.0], [2.0, 0.5]])}
        >>> create_mask_from_fisher(scores, keep_ratio=0.5)["layer.weight"]
        tensor([[False,  True],
                [ True, False]])
    """
    if scope not in get_args(Scope):
        raise ValueError(f"scope={scope!r} is unknown: use one of {', '.join(get_args(Scope))}.")
    check_scores("fisher_scores", fisher_scores)
    _check_scores(fisher_scores)
    entries = {name: scores.numel() for name, scores in fisher_scores.items()}
    pool, k = pool_and_quota(entries, keep_ratio, names_to_exclude, num_trainable)
    _report_unmatched(patterns_of(names_to_exclude), entries)
    selected, ties = _select(fisher_scores, pool, k, scope)
    _report_ties(ties)
    return FishMask(
        {
            name: selected[name] if name in selected else _all_entries(scores)
            for name, scores in fisher_scores.items()
        },
        provenance={
            "keep_ratio": None if keep_ratio is None else float(keep_ratio),
            "num_trainable": None if num_trainable is None else int(num_trainable),
            "names_to_exclude": patterns_of(names_to_exclude),
            "scope": scope,
            "selected_by_position": sum(taken for _, _, taken in ties),
            **(provenance or {}),
        },
    )


def _report_unmatched(patterns: Iterable[str], names: Collection[str]) -> None:
    """Warn of patterns that match nothing, but for the default one: not every model has a head."""
    for pattern in patterns:
        if pattern != "modules_to_save" and not any(re.search(pattern, name) for name in names):
            logger.warning(
                "names_to_exclude: %r matches none of the %d scored tensors: it excludes nothing",
                pattern,
                len(names),
            )


def _select(
    scores: Mapping[str, Tensor], pool: Mapping[str, int], k: int, scope: Scope
) -> tuple[dict[str, Tensor], list[Tie]]:
    """Masks of the pool's tensors, and the ties in which position decided."""
    # All scores are ranked as the widest type among them, so different types compare exactly.
    double = any(scores[name].dtype == torch.float64 for name in pool)
    dtype = torch.float64 if double else torch.float32
    best = select_features if scope in ("features", "adaptive") else highest
    masks: dict[str, Tensor] = {}
    ties: list[Tie] = []
    for names, quota in shares_of(scores, pool, k, scope):
        selected, (score, tied, taken) = best({n: scores[n] for n in names}, quota, dtype)
        masks.update(selected)
        if 0 < taken < tied:
            ties.append((score, tied, taken))
    return masks, ties


def _check_scores(scores: Mapping[str, Tensor]) -> None:
    if not scores:
        raise ValueError(
            "There are no scores to select from: the mapping is empty. Score a model that has "
            "trainable parameters."
        )
    for name, tensor in scores.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"The scores of {name} are {kind}: give floating-point tensors.")
    parts = [Part(tensor) for tensor in scores.values()]
    counts = totals(parts, torch.tensor([_count_not_finite(part.local) for part in parts]))
    bad = [
        f"{name} ({count:,} of {tensor.numel():,})"
        for (name, tensor), count in zip(scores.items(), counts.tolist(), strict=True)
        if count
    ]
    if bad:
        more = f" and {len(bad) - 5} more tensors" if len(bad) > 5 else ""
        raise ValueError(
            f"Scores that are NaN or infinite cannot be ranked: {', '.join(bad[:5])}{more}. "
            "Look for a loss that is not finite, or for an overflow, where they were computed."
        )


def _count_not_finite(tensor: Tensor) -> int:
    # The minimum and the maximum are NaN if any entry is, and computing them takes no memory.
    if not tensor.numel() or all(map(math.isfinite, map(float, tensor.detach().aminmax()))):
        return 0
    return int((~tensor.isfinite()).sum())


def _all_entries(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape, dtype=torch.bool, device=Part(scores).mask_device)


def _report_ties(ties: Sequence[Tie]) -> None:
    """Log where position decided. Zeros get a warning: no score decided between them."""
    for zero in (True, False):
        found = [tie for tie in ties if (tie[0] == 0) == zero]
        if not found:
            continue
        low, high = min(score for score, _, _ in found), max(score for score, _, _ in found)
        advice = (
            " An entry with score 0 had no gradient where it was scored, so its score says nothing "
            "about it. With LoRA, the usual cause is A while B is zero: score with "
            'score_with_perturbed_b and select with scope="adaptive", or score after some training '
            "steps. With a model's own weights, it is embeddings of tokens that the data does not "
            "contain: freeze them. Was an adapter meant to be on the model?"
        )
        logger.log(
            logging.WARNING if zero else logging.INFO,
            "%s entries tie at score %s, more than the budget has room for: %s of them were taken "
            "by position, not by score.%s",
            f"{sum(tied for _, tied, _ in found):,}",
            f"{low:g}" if low == high else f"{low:g} to {high:g}",
            f"{sum(taken for _, _, taken in found):,}",
            advice if zero else "",
        )
