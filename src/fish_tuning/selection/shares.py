"""How a budget is divided between the tensors of a pool, before the best entries are taken."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

from fish_tuning.config import Scope
from fish_tuning.names import kind_of, side_of
from fish_tuning.parts import Part
from fish_tuning.selection.exact_sums import exact_sums

Share = tuple[list[str], int]
"""Names of tensors, and how many entries to select from all of them together."""


def shares_of(
    scores: Mapping[str, Tensor], sizes: Mapping[str, int], k: int, scope: Scope
) -> list[Share]:
    """Divides k entries between groups of tensors; no group gets more entries than it has.

    Args:
        scores: Scores by name, at least for the tensors of the pool.
        sizes: Number of entries by name, for the tensors of the pool.
        k: How many entries to divide.
        scope: How to divide them.
    """
    if scope == "global":
        return [(list(sizes), k)]
    if scope in ("per_tensor", "features"):
        return _one_each(proportional(k, sizes, sizes))
    if scope == "balanced":
        return _balanced(sizes, k)
    return _adaptive(scores, sizes, k)


def _one_each(quotas: Mapping[str, int]) -> list[Share]:
    return [([name], quota) for name, quota in quotas.items()]


def _balanced(sizes: Mapping[str, int], k: int) -> list[Share]:
    sides: dict[str, list[str]] = {"B": [], "A": [], "": []}
    for name in sizes:
        sides[side_of(name)].append(name)
    room = {side: sum(sizes[name] for name in names) for side, names in sides.items()}
    quotas = proportional(k, dict.fromkeys(sides, 1), room)
    return [(names, quotas[side]) for side, names in sides.items() if names]


def _adaptive(scores: Mapping[str, Tensor], sizes: Mapping[str, int], k: int) -> list[Share]:
    kinds: dict[str, dict[str, int]] = {}
    for name, size in sizes.items():
        kinds.setdefault(kind_of(name), {})[name] = size
    room = {kind: sum(of_kind.values()) for kind, of_kind in kinds.items()}
    quotas = proportional(k, room, room)
    shares = []
    for kind, of_kind in kinds.items():
        gains = _gains({name: scores[name] for name in of_kind})
        density = Fraction(quotas[kind], max(room[kind], 1))
        bound = max(density, Fraction(math.sqrt(density / 2)))
        most = {name: math.ceil(bound * size) for name, size in of_kind.items()}
        shares += _one_each(proportional(quotas[kind], gains, most))
    return shares


def _gains(scores: Mapping[str, Tensor]) -> dict[str, float]:
    """The expected gain of training each tensor's entries, relative to the other tensors.

    Adam moves an entry by about the learning rate, whatever the scale of its gradient. A step
    therefore changes the loss by the sum of |gradient|, not of its square. Fisher information is
    the mean square, so the sum is about the size times the root of the mean score (exactly that if
    all entries of the tensor have the same).

    Reversed scores have negative means. For them the gain is the size over the root, so that
    what had the highest gain has the lowest. If means of both signs occur, negative ones give 0.
    """
    sums = exact_sums([Part(tensor) for tensor in scores.values()])
    means = {
        name: total / max(tensor.numel(), 1)
        for (name, tensor), total in zip(scores.items(), sums, strict=True)
    }
    if max(means.values()) <= 0 > min(means.values()):
        smallest = torch.finfo(torch.float64).tiny
        roots = {name: max(-mean, smallest) ** -0.5 for name, mean in means.items()}
    else:
        roots = {name: max(mean, 0.0) ** 0.5 for name, mean in means.items()}
    return {name: scores[name].numel() * root for name, root in roots.items()}


def proportional(k: int, weights: Mapping[str, float], room: Mapping[str, int]) -> dict[str, int]:
    """Integers in proportion to the weights that sum to k, none of them above its room.

    What does not fit goes to the other names in the same proportion, or in proportion to their
    room if only weights of 0 are left. Fractions are rounded by largest remainder; of equal
    remainders, the first is rounded up.

    Args:
        k: The sum, at most the sum of `room`.
        weights: A finite weight by name, at least 0.
        room: The largest number that each name can take.
    """
    quotas = dict.fromkeys(room, 0)
    open_, left = list(room), k
    while open_ and left:
        parts = {name: Fraction(weights[name]) for name in open_}
        if not any(parts.values()):
            parts = {name: Fraction(room[name]) for name in open_}
        unit = left / sum(parts.values())
        exact = {name: unit * part for name, part in parts.items()}
        filled = [name for name in open_ if exact[name] >= room[name]]
        if not filled:
            quotas |= {name: int(value) for name, value in exact.items()}
            by_remainder = sorted(open_, key=lambda name: exact[name] % 1, reverse=True)
            for name in by_remainder[: k - sum(quotas.values())]:
                quotas[name] += 1
            break
        for name in filled:
            quotas[name] = room[name]
            left -= room[name]
            open_.remove(name)
    return quotas
