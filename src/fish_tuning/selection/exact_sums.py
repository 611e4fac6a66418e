"""Sums without rounding errors, which do not depend on the order of addition."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from fish_tuning.parts import Part, totals

_LOWEST = -1073
"""The lowest exponent of a float64 other than 0, as `torch.frexp` has it; 1024 is the highest."""

_EXPONENTS = 1024 - _LOWEST + 1

_CHUNK = 2**18
"""Entries at a time: the temporaries of a chunk fit in a CPU's caches."""


def exact_sums(parts: Sequence[Part]) -> list[float]:
    """The sum of each tensor, rounded once, at the end.

    The same numbers have the same sum however they are ordered, on every device, with any number of
    threads, and whether or not they are divided among processes; ordinary sums differ in their last
    bits. A finite float is m 2^e, with integers m and e. Here the m are added up for each e, as
    integers: m in two halves, so that the sums of 2^36 entries fit in 64 bits.

    Args:
        parts: Parts of tensors whose entries are finite. All processes have to call.
    """
    integers = torch.zeros(len(parts), 2, _EXPONENTS, dtype=torch.int64)
    for part, own in zip(parts, integers, strict=True):
        own += _by_exponent(part.local).cpu()
    return [_value(high, low) for high, low in totals(parts, integers).tolist()]


def _by_exponent(tensor: Tensor) -> Tensor:
    """Sums of the upper and lower halves of m, (2, exponents)."""
    sums = torch.zeros(2, _EXPONENTS, dtype=torch.int64, device=tensor.device)
    for chunk in tensor.detach().reshape(-1).split(_CHUNK):
        double = chunk.dtype == torch.float64
        m, exponent = torch.frexp(chunk if double else chunk.float())
        bins = exponent.long() - _LOWEST
        m *= 2**27
        high = m.trunc()
        sums[0].index_add_(0, bins, high.long())
        if double:  # Others have no more than 24 bits.
            sums[1].index_add_(0, bins, ((m - high) * 2**26).long())
    return sums


def _value(high: list[int], low: list[int]) -> float:
    sums = ((upper << 26) + lower for upper, lower in zip(high, low, strict=True))
    total = sum(m << e for e, m in enumerate(sums) if m)
    return float(Fraction(total) * Fraction(2) ** (_LOWEST - 53))
