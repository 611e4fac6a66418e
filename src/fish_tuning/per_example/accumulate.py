"""Per-example gradients -> sums, a few examples at a time."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from fish_tuning.per_example.checks import TotalsCheck
from fish_tuning.per_example.closed_forms import embedding_rows
from fish_tuning.per_example.rows import add_rows
from fish_tuning.per_example.sources import Bundle, Call, Sources
from fish_tuning.per_example.sums import GradientSums

CHUNK_ENTRIES = 2**24
"""Most entries of per-example gradients in memory at once: wide layers get fewer examples."""


def accumulate(
    sums: GradientSums,
    sources: Sources,
    bundle: Bundle,
    calls: Sequence[Call],
    done: Counter[str],
    check: TotalsCheck | None = None,
) -> None:
    """Adds the gradients of a bundle of parameters for all examples of a batch.

    Args:
        sums: Where to add the gradients.
        sources: How to compute them.
        bundle: The parameters.
        calls: All calls of modules that use these parameters.
        done: How many leading examples each sum has already; updated.
        check: Gets the gradients too, before they are squared in place.
    """
    size = len(calls[0].x)
    # A failed attempt may have got further with some parameters than with others.
    first = min(done[name] for name in bundle)
    if bundle in sources.lookups:
        if first < size:
            _accumulate_lookups(sums, bundle[0], calls, first, check)
            done[bundle[0]] = size
        return
    dtype = sums.totals[bundle[0]].dtype
    step = max(1, CHUNK_ENTRIES // sources.entries[bundle])
    for start in range(first, size, step):
        rows = slice(start, min(start + step, size))
        for name, gradients in _gradients(sources, bundle, calls, rows, dtype).items():
            new = gradients[max(0, done[name] - start) :]
            if check is not None:
                check.add(name, new)
            sums.add(name, new)
            done[name] = max(done[name], rows.stop)


def _gradients(
    sources: Sources, bundle: Bundle, calls: Sequence[Call], rows: slice, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The gradients of some examples, (rows, *shape) by name, summed over the calls."""
    gradients: dict[str, Tensor] = {}
    for call in calls:
        for name, of_call in sources.gradients(bundle, call, rows, dtype):
            known = gradients.get(name)
            gradients[name] = of_call if known is None else known + of_call
    return gradients


def _accumulate_lookups(
    sums: GradientSums,
    name: str,
    calls: Sequence[Call],
    first: int,
    check: TotalsCheck | None,
) -> None:
    """Adds an embedding's gradients: only the rows that an example looks up have one."""
    total, part = sums.totals[name], sums.parts[name]
    pairs = [
        embedding_rows(call.module, call.x[first:], call.g[first:].to(total.dtype))
        for call in calls
    ]
    ids = torch.cat([ids for ids, _ in pairs], 1)
    g = torch.cat([g for _, g in pairs], 1).flatten(0, 1)
    example = torch.arange(len(ids), device=ids.device).unsqueeze(1).expand_as(ids).flatten()
    ids, here = part.positions(ids.flatten())
    example, g = example[here], g[here]
    # An example may look up a row several times: its gradients are added before they are squared.
    vocabulary = len(total)
    looked_up, position = (ids + vocabulary * example).unique(return_inverse=True)
    gradients = add_rows(g.new_zeros(len(looked_up), g.shape[-1]), position, g)
    if check is not None:
        check.add_rows(name, ids, g)
    sums.add_rows(name, looked_up % vocabulary, gradients)
