"""Radix selection: exactly the k highest of many scores, without sorting or copying all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from fish_tuning.parts import Part, totals

# Entries ranked at a time. On a CPU, the temporaries of a chunk fit in its caches. An accelerator
# would only launch kernels with chunks that small; its temporaries take about 100 MB.
CPU_CHUNK = 2**18
ACCELERATOR_CHUNK = 2**22

# Bits determined per pass. 16 would halve the passes, but adapter tensors are often smaller than
# a histogram of 2**16 counts.
RADIX = 8

# Of at least FEWEST_SAMPLED scores, one in SAMPLED is a sample. A rank in it is trusted to MARGIN
# times the square root of its size, eight standard deviations or more. It is of no use where more
# than MOST_BETWEEN of all scores would be kept.
SAMPLED = 64
FEWEST_SAMPLED = 2**22
MARGIN = 4.0
MOST_BETWEEN = 1 / 16

KeysOf = Callable[[], Iterator[Tensor]]
"""Yields the keys of a part's entries, chunk by chunk."""

Tie = tuple[float, int, int]
"""The lowest score taken, how many entries have it, and how many of those were taken."""


def highest(
    scores: Mapping[str, Tensor], k: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tie]:
    """Selects the k highest scores; equal scores are taken by position.

    Of scores that are divided among processes, each process ranks the rows that it holds. Only
    counts are exchanged, and at the end the masks.

    Args:
        scores: Scores by name, none of them NaN. Position is the order of names, then the flat
            index.
        k: How many entries to select, at most all.
        dtype: What to rank the scores as, float32 or float64.

    Returns:
        Masks by name, and the tie at the lowest score that was taken. A mask is complete; that of
        divided scores is on the CPU.
    """
    parts = {name: Part(tensor) for name, tensor in scores.items()}
    if not k:
        zeros = {n: _no_entry(scores[n].shape, part) for n, part in parts.items()}
        return zeros, (0.0, 0, 0)
    threshold, tied, taken = _kth_highest(list(parts.values()), k, dtype)
    left = taken
    masks = {}
    for name, part in parts.items():
        here = 0
        if left and taken < tied:
            keys_here = _ordered_keys(part.local, dtype)
            count = sum(int((keys == threshold).sum()) for keys in keys_here)
            before, total = part.before(count)
            here, left = max(left - before, 0), max(left - total, 0)
        flat = torch.empty(part.local.numel(), dtype=torch.bool, device=part.local.device)
        for out, keys in zip(_chunks(flat), _ordered_keys(part.local, dtype), strict=True):
            if taken == tied:
                torch.ge(keys, threshold, out=out)
                continue
            torch.gt(keys, threshold, out=out)
            if here:
                at_threshold = keys == threshold
                at_threshold &= at_threshold.cumsum(0) <= here
                out |= at_threshold
                here -= int(at_threshold.sum())
        masks[name] = part.complete(flat.view(part.local.shape)).to(part.mask_device)
    bits = torch.tensor(abs(threshold), dtype=_INTEGER[dtype])
    return masks, (math.copysign(bits.view(dtype).item(), threshold), tied, taken)


def _no_entry(shape: torch.Size, part: Part) -> Tensor:
    return torch.zeros(shape, dtype=torch.bool, device=part.mask_device)


def _kth_highest(parts: Sequence[Part], k: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Key of the k-th highest score, how many entries have it, and how many of those are taken.

    Of many scores, a sample tells between which keys it lies, and only the few between are ranked.
    A sample that misleads costs time only.
    """
    keys_of: list[KeysOf] = [partial(_ordered_keys, part.local, dtype) for part in parts]
    if (bracket := _bracket(parts, k, dtype)) is not None:
        above, few, between = _narrowed(parts, keys_of, *bracket)
        if above < k <= above + few:
            keys_of, k = between, k - above
    return _by_radix(parts, keys_of, k, torch.finfo(dtype).bits)


def _narrowed(
    parts: Sequence[Part], keys_of: Sequence[KeysOf], low: int, high: int
) -> tuple[int, int, list[KeysOf]]:
    """How many keys lie above two, how many from one to the other, and the latter themselves.

    It takes one look at all keys.
    """
    counts = torch.zeros(len(parts), 2, dtype=torch.int64)
    kept: list[list[Tensor]] = [[] for _ in parts]
    for part, keys_here, count, between in zip(parts, keys_of, counts, kept, strict=True):
        above = torch.zeros((), dtype=torch.int64, device=part.local.device)
        for keys in keys_here():
            above += (keys > high).sum()
            between.append(keys[(keys >= low) & (keys <= high)])
        count[0], count[1] = above, sum(map(len, between))
    above_all, between_all = totals(parts, counts).sum(0).tolist()
    return above_all, between_all, [partial(iter, between) for between in kept]


def _bracket(parts: Sequence[Part], k: int, dtype: torch.dtype) -> tuple[int, int] | None:
    """Two keys between which that of the k-th highest score lies, almost certainly.

    None if there are too few scores for a sample, or too many of them between the keys.
    """
    numbers = [part.local.numel() for part in parts]
    sizes = torch.tensor([[n, math.ceil(n / SAMPLED)] for n in numbers])
    entries, size = totals(parts, sizes).sum(0).tolist()
    if entries < FEWEST_SAMPLED:
        return None
    bits = torch.finfo(dtype).bits
    samples = [part.local.reshape(-1)[::SAMPLED].contiguous() for part in parts]
    keys_of: list[KeysOf] = [partial(_ordered_keys, sample, dtype) for sample in samples]
    expected = k * size / entries
    margin = MARGIN * math.sqrt(size)
    first, last = max(math.floor(expected - margin), 0), math.ceil(expected + margin)
    limits = torch.iinfo(_INTEGER[dtype])
    high = _by_radix(parts, keys_of, first, bits)[0] if first else limits.max
    low, tied, taken = limits.min, 0, 0
    if last < size:
        low, tied, taken = _by_radix(parts, keys_of, last, bits)
    few = last - first + tied - taken <= MOST_BETWEEN * size
    return (low, high) if few else None


def _by_radix(
    parts: Sequence[Part], keys_of: Sequence[KeysOf], k: int, bits: int
) -> tuple[int, int, int]:
    """The k-th highest of the parts' keys, how many are equal to it, how many of those are taken.

    Each pass looks at the keys that begin with the bits known so far, counts their next bits and
    so determines the next bits of the k-th highest key.
    """
    key, left = 0, k
    highest = bits - RADIX
    for shift in range(highest, -1, -RADIX):
        histograms = torch.zeros(len(parts), 2**RADIX, dtype=torch.int64)
        for keys_here, histogram in zip(keys_of, histograms, strict=True):
            for keys in keys_here():
                if shift == highest:
                    digits = (keys >> shift) + 2 ** (RADIX - 1)  # the digit that has the sign
                else:
                    digits = (keys[keys >> (shift + RADIX) == key] >> shift) & (2**RADIX - 1)
                histogram += torch.bincount(digits, minlength=2**RADIX).cpu()
        at_least = totals(parts, histograms).sum(0).flip(0).cumsum(0)
        position = int(torch.searchsorted(at_least, left))
        digit = 2**RADIX - 1 - position
        count = int(at_least[position]) - (int(at_least[position - 1]) if position else 0)
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
