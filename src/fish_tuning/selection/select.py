"""From scores to a mask: which entries are among the k best, exactly k of them."""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fish_tuning.config import Scope
from fish_tuning.mask.mask import FishMask
from fish_tuning.selection.lora import select_features
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

    The scores may be of any criterion: FISH Mask (arXiv 2111.09839) and FISH-Tuning take the
    diagonal of the Fisher information. Ties go by position, names in sorted order and then the
    flat index, lowest first, so that the same scores always give the same mask; the log says when
    that decided, as a warning where the tied score is 0. The scores are neither sorted nor copied:
    beyond the mask, the memory used does not grow with the pool (a tensor that is not contiguous
    is copied while it is read).

    Args:
        fisher_scores: Parameter name to scores of the parameter's shape, floating point of any
            sign, each on any device; its mask comes out there.
        keep_ratio: Fraction of the pool to select, in (0, 1]. The pool is all that
            `names_to_exclude` does not match; k is `max(1, round(keep_ratio * pool))`.
        names_to_exclude: Regular expressions, searched for in the names. What one matches is left
            dense: all True in the mask, not part of the pool.
        num_trainable: Number of True entries in all, those of dense tensors counted. Give either
            this or `keep_ratio`.
        scope: How k is shared out, see `Scope`.
        provenance: Further values for the mask's provenance, which records the arguments.

    Returns:
        The mask, its tensors in the order of `fisher_scores`.

    Raises:
        ValueError: Scores are missing, not floating point or not finite, everything is excluded,
            a regular expression is invalid, the budget cannot be met, or the scope is unknown.
    """
    if scope not in get_args(Scope):
        raise ValueError(f"scope={scope!r} is unknown: use one of {', '.join(get_args(Scope))}.")
    _check_scores(fisher_scores)
    entries = {name: scores.numel() for name, scores in fisher_scores.items()}
    sizes, k = pool_and_quota(entries, keep_ratio, names_to_exclude, num_trainable)

    # Ranked as the widest type among them, so that tensors of different types compare exactly.
    double = any(fisher_scores[name].dtype == torch.float64 for name in sizes)
    dtype = torch.float64 if double else torch.float32
    masks = {}
    ties: list[Tie] = []
    for names, quota in shares_of(fisher_scores, sizes, k, scope):
        group = {name: fisher_scores[name] for name in names}
        select = _SELECTS.get(scope, highest)
        selected, tie = select(group, quota, dtype)
        masks.update(selected)
        ties.append(tie)
    ties = [(score, tied, taken) for score, tied, taken in ties if 0 < taken < tied]
    _report_ties(ties)
    return FishMask(
        {
            name: masks[name] if name in masks else torch.ones_like(scores, dtype=torch.bool)
            for name, scores in fisher_scores.items()
        },
        provenance={
            "keep_ratio": None if keep_ratio is None else float(keep_ratio),
            "num_trainable": None if num_trainable is None else int(num_trainable),
            "names_to_exclude": _patterns(names_to_exclude),
            "scope": scope,
            "selected_by_position": sum(taken for _, _, taken in ties),
            **(provenance or {}),
        },
    )


def pool_and_quota(
    entries: Mapping[str, int],
    keep_ratio: float | None,
    names_to_exclude: Sequence[str] | str | None,
    num_trainable: int | None,
) -> tuple[dict[str, int], int]:
    """What `create_mask_from_fisher` selects from, and how many entries, without any scores.

    Args:
        entries: Parameter name to number of entries.
        keep_ratio: As in `create_mask_from_fisher`.
        names_to_exclude: As there.
        num_trainable: As there.

    Returns:
        Entries by name of the pool, names sorted, and k.

    Raises:
        ValueError: As there.
    """
    patterns = _patterns(names_to_exclude)
    pool = {name: entries[name] for name in sorted(_not_matching(entries, patterns))}
    size = sum(pool.values())
    if not size:
        raise ValueError(
            f"names_to_exclude={patterns} matches all {len(entries)} scored tensors, "
            "so nothing is left to select from. Exclude less."
        )
    return pool, _num_to_select(size, sum(entries.values()) - size, keep_ratio, num_trainable)


def _patterns(names_to_exclude: Sequence[str] | str | None) -> list[str]:
    return [names_to_exclude] if isinstance(names_to_exclude, str) else [*(names_to_exclude or [])]


def random_scores(like: Mapping[str, Tensor | Sequence[int]], seed: int) -> dict[str, Tensor]:
    """Scores uniform in [0, 1): selecting by them selects at random.

    A tensor's scores depend on the seed, its name and its shape alone, not on the other tensors.

    Args:
        like: Parameter name to a tensor of the wanted shape, or to the shape itself.
        seed: Seed of the draw.

    Returns:
        Name to float64 scores on the CPU; in float32 a large pool would hold many ties.
    """
    scores = {}
    for name, shape in like.items():
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
        size = tuple(shape.shape if isinstance(shape, Tensor) else shape)
        scores[name] = torch.rand(size, generator=generator, dtype=torch.float64)
    return scores


def reversed_scores(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The scores negated: selecting by them selects the least important entries.

    Args:
        scores: Parameter name to scores.

    Returns:
        Name to negated scores of the same shape, dtype and device.
    """
    return {name: -tensor for name, tensor in scores.items()}


def magnitude_scores(model_or_params: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The absolute value of every weight: selecting by it selects the largest weights.

    Args:
        model_or_params: A model, of which every trainable parameter is scored, or a mapping from
            name to weights, all of which are.

    Returns:
        Name to detached scores of the same shape, dtype and device as the weights.
    """
    if isinstance(model_or_params, nn.Module):
        model_or_params = {n: p for n, p in model_or_params.named_parameters() if p.requires_grad}
    return {name: tensor.detach().abs() for name, tensor in model_or_params.items()}


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
    # Lowest and highest are both NaN where any entry is, and need no memory to find.
    bad = [
        f"{name} ({int((~tensor.isfinite()).sum()):,} of {tensor.numel():,})"
        for name, tensor in scores.items()
        if tensor.numel() and not all(map(math.isfinite, map(float, tensor.detach().aminmax())))
    ]
    if bad:
        more = f" and {len(bad) - 5} more tensors" if len(bad) > 5 else ""
        raise ValueError(
            f"Scores that are NaN or infinite cannot be ranked: {', '.join(bad[:5])}{more}. "
            "Look for a non-finite loss or an overflow where they were computed."
        )


def _not_matching(names: Mapping[str, int], patterns: Sequence[str]) -> Iterator[str]:
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except (re.error, TypeError) as error:
            raise ValueError(
                f"names_to_exclude holds {pattern!r}, which is not a regular expression: {error}."
            ) from error
    return (name for name in names if not any(pattern.search(name) for pattern in compiled))


def _num_to_select(
    pool: int, num_dense: int, keep_ratio: float | None, num_trainable: int | None
) -> int:
    """The k of the selection, checked."""
    if (keep_ratio is None) == (num_trainable is None):
        raise ValueError(
            f"Give exactly one of keep_ratio (here {keep_ratio!r}), a fraction of the {pool:,} "
            f"entries to select from, and num_trainable (here {num_trainable!r}), a count in all "
            f"with the {num_dense:,} entries of excluded tensors."
        )
    if keep_ratio is not None:
        is_number = isinstance(keep_ratio, Real) and not isinstance(keep_ratio, bool)
        if not (is_number and 0 < keep_ratio <= 1):
            raise ValueError(
                f"keep_ratio={keep_ratio!r} is not a number in (0, 1]: it is the fraction to keep "
                f"of {pool:,} entries. To ask for a count, use num_trainable."
            )
        return max(1, round(float(keep_ratio) * pool))
    if (
        not isinstance(num_trainable, Integral)
        or isinstance(num_trainable, bool)
        or not num_dense < num_trainable <= num_dense + pool
    ):
        raise ValueError(
            f"num_trainable={num_trainable!r} is not an integer from {num_dense + 1:,} to "
            f"{num_dense + pool:,}: {num_dense:,} entries of excluded tensors are always trained "
            f"and 1 to {pool:,} others can be selected. Change it, or names_to_exclude."
        )
    return int(num_trainable) - num_dense


_SELECTS = {"features": select_features, "adaptive": select_features}


def _report_ties(ties: Sequence[Tie]) -> None:
    """Say where position decided, given (score, how many have it, how many were taken)."""
    for zero in (True, False):
        found = [tie for tie in ties if (tie[0] == 0) == zero]
        if not found:
            continue
        lowest, highest = min(tie[0] for tie in found), max(tie[0] for tie in found)
        # A handful of equal scores is nothing to worry about; zeros mean that no score decided.
        logger.log(
            logging.WARNING if zero else logging.INFO,
            "%s entries tie at score %s, too many for the budget: %s of them were taken by "
            "position, not by score.%s",
            f"{sum(tied for _, tied, _ in found):,}",
            f"{lowest:g}" if lowest == highest else f"{lowest:g} to {highest:g}",
            f"{sum(taken for _, _, taken in found):,}",
            " An entry that scores 0 had no gradient where it was scored, so its score says "
            "nothing about it. The usual cause is LoRA's A while B is zero. Score with "
            'score_with_perturbed_b and select with scope="adaptive", or score after some '
            "training steps."
            if zero
            else "",
        )
