"""How a budget is shared out between the tensors of a pool, before the best entries are taken."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

from fish_tuning.config import Scope
from fish_tuning.names import kind_of, side_of

Share = tuple[list[str], int]
"""Names, and how many entries are selected among all of theirs."""


def shares_of(
    scores: Mapping[str, Tensor], sizes: Mapping[str, int], k: int, scope: Scope
) -> list[Share]:
    """Groups of tensors, and how many entries each of them gets: k in all, none more than it has.

    Args:
        scores: By name, at least those of `sizes`.
        sizes: Entries by name, of the pool.
        k: How many to share out.
        scope: How.
    """
    if scope == "global":
        return [(list(sizes), k)]
    if scope in ("per_tensor", "features"):
        return _one_each(proportional(k, sizes, sizes))
    if scope == "balanced":
        sides: dict[str, list[str]] = {"B": [], "A": [], "": []}
        for name in sizes:
            sides[side_of(name)].append(name)
        room = {side: sum(sizes[name] for name in names) for side, names in sides.items()}
        quotas = proportional(k, dict.fromkeys(sides, 1), room)
        return [(names, quotas[side]) for side, names in sides.items() if names]
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


def _one_each(quotas: Mapping[str, int]) -> list[Share]:
    return [([name], quota) for name, quota in quotas.items()]


def _gains(scores: Mapping[str, Tensor]) -> dict[str, float]:
    """What training a tensor's entries is expected to give, relative to the others.

    Adam moves an entry by about the learning rate whatever the scale of its gradient, so that a
    step changes the loss by a sum of |gradient|, not of its square. With Fisher information for
    the scores, which are mean squares, size times root of the mean is that sum (as if all entries
    of a tensor had the same).

    Reversed scores, whose means are negative, give the reciprocal roots: what has the highest
    gain has the lowest now. Of means of both signs the negative ones give nothing.
    """
    means = {
        name: float(tensor.sum(dtype=torch.float64)) / max(tensor.numel(), 1)
        for name, tensor in scores.items()
    }
    if max(means.values()) <= 0 > min(means.values()):
        smallest = torch.finfo(torch.float64).tiny
        roots = {name: max(-mean, smallest) ** -0.5 for name, mean in means.items()}
    else:
        roots = {name: max(mean, 0.0) ** 0.5 for name, mean in means.items()}
    return {name: scores[name].numel() * root for name, root in roots.items()}


def proportional(k: int, weights: Mapping[str, float], room: Mapping[str, int]) -> dict[str, int]:
    """Whole numbers that are in proportion to the weights and sum to k, none above its room.

    What is more than the room goes to the others in the same proportion, and by room where only
    weights of 0 are left. Rounded by largest remainder, the first of equal ones first.

    Args:
        k: The sum, at most that of `room`.
        weights: Not negative, finite.
        room: The most that each name takes.
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
