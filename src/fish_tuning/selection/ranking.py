"""Radix selection: exactly the k highest of many scores, without sorting or copying them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

# Entries ranked at a time. On a CPU, the temporaries of a chunk fit in its caches. An accelerator
# would only launch kernels with chunks that small; its temporaries take about 100 MB.
CPU_CHUNK = 2**18
ACCELERATOR_CHUNK = 2**22

# Bits determined per pass. 16 would halve the passes, but adapter tensors are often smaller than
# a histogram of 2**16 counts.
RADIX = 8

Tie = tuple[float, int, int]
"""The lowest score taken, how many entries have it, and how many of those were taken."""


def highest(
    scores: Mapping[str, Tensor], k: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tie]:
    """Selects the k highest scores; equal scores are taken by position.

    Args:
        scores: Scores by name, none of them NaN. Position is the order of names, then the flat
            index.
        k: How many entries to select, at most all.
        dtype: What to rank the scores as, float32 or float64.

    Returns:
        Masks by name, and the tie at the lowest score that was taken.
    """
    if not k:
        zeros = {n: torch.zeros_like(t, dtype=torch.bool) for n, t in scores.items()}
        return zeros, (0.0, 0, 0)
    threshold, tied, taken = _kth_highest(list(scores.values()), k, dtype)
    left = taken
    masks = {}
    for name, tensor in scores.items():
        flat = torch.empty(tensor.numel(), dtype=torch.bool, device=tensor.device)
        for out, keys in zip(_chunks(flat), _ordered_keys(tensor, dtype), strict=True):
            if taken == tied:
                torch.ge(keys, threshold, out=out)
                continue
            torch.gt(keys, threshold, out=out)
            if left:
                at_threshold = keys == threshold
                at_threshold &= at_threshold.cumsum(0) <= left
                out |= at_threshold
                left -= int(at_threshold.sum())
        masks[name] = flat.view(tensor.shape)
    bits = torch.tensor(abs(threshold), dtype=_INTEGER[dtype])
    return masks, (math.copysign(bits.view(dtype).item(), threshold), tied, taken)


def _kth_highest(tensors: Sequence[Tensor], k: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Key of the k-th highest score, how many entries have it, and how many of those are taken.

    Each pass looks at the keys that begin with the bits known so far, counts their next bits and
    so determines the next bits of the k-th highest key.
    """
    key, left = 0, k
    highest = torch.finfo(dtype).bits - RADIX
    for shift in range(highest, -1, -RADIX):
        histogram = torch.zeros(2**RADIX, dtype=torch.int64)
        for tensor in tensors:
            for keys in _ordered_keys(tensor, dtype):
                if shift == highest:
                    digits = (keys >> shift) + 2 ** (RADIX - 1)  # the digit that has the sign
                else:
                    digits = (keys[keys >> (shift + RADIX) == key] >> shift) & (2**RADIX - 1)
                histogram += torch.bincount(digits, minlength=2**RADIX).cpu()
        at_least = histogram.flip(0).cumsum(0)
        position = int(torch.searchsorted(at_least, left))
        digit = 2**RADIX - 1 - position
        count = int(histogram[digit])
        left -= int(at_least[position]) - count
        key = digit - 2 ** (RADIX - 1) if shift == highest else key << RADIX | digit
    return key, count, left


def _chunks(flat: Tensor) -> Sequence[Tensor]:
    return torch.split(flat, CPU_CHUNK if flat.device.type == "cpu" else ACCELERATOR_CHUNK)


_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}


def _ordered_keys(tensor: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Integers that order like the scores, chunk by chunk; -0.0 and 0.0 give the same integer.

    A float consists of a sign bit and a magnitude whose bits order like an integer. Only the
    magnitude of negative floats has to be negated.
    """
    integer = _INTEGER[dtype]
    lowest = torch.iinfo(integer).min
    for chunk in _chunks(tensor.reshape(-1)):
        bits = chunk.to(dtype).view(integer)
        yield torch.where(bits < 0, lowest - bits, bits)
