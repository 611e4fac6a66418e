"""The budget of a selection: which tensors are the pool, and how many of their entries to take."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real


def pool_and_quota(
    entries: Mapping[str, int],
    keep_ratio: float | None,
    names_to_exclude: Sequence[str] | str | None,
    num_trainable: int | None,
) -> tuple[dict[str, int], int]:
    """The pool that `create_mask_from_fisher` selects from, and k, from the sizes alone.

    Args:
        entries: Parameter name to number of entries, for all tensors.
        keep_ratio: Fraction of the pool to select.
        names_to_exclude: Regular expressions of names that are not part of the pool.
        num_trainable: Number of entries to train in total, excluded tensors included.

    Returns:
        Parameter name to number of entries for the pool, sorted by name, and k.

    Raises:
        ValueError: The pool is empty, a regular expression is invalid, or the budget is not
            possible or not given exactly once.
    """
    patterns = patterns_of(names_to_exclude)
    pool = {name: entries[name] for name in sorted(not_matching(entries, patterns))}
    size = sum(pool.values())
    if not size:
        raise ValueError(
            f"names_to_exclude={patterns} matches all {len(entries)} scored tensors, "
            "so nothing is left to select from. Exclude less."
        )
    num_dense = sum(entries.values()) - size
    if (keep_ratio is None) == (num_trainable is None):
        raise ValueError(
            f"Give exactly one of keep_ratio (here {keep_ratio!r}), a fraction of the {size:,} "
            f"entries to select from, and num_trainable (here {num_trainable!r}), a total that "
            f"includes the {num_dense:,} entries of excluded tensors."
        )
    if keep_ratio is not None:
        return pool, _quota_of_ratio(keep_ratio, size)
    return pool, _quota_of_total(num_trainable, size, num_dense)


def patterns_of(names_to_exclude: Sequence[str] | str | None) -> list[str]:
    """The regular expressions as a list; one alone may be given as a string."""
    return [names_to_exclude] if isinstance(names_to_exclude, str) else [*(names_to_exclude or [])]


def not_matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """The names in which none of the regular expressions is found.

    Raises:
        ValueError: A pattern is not a regular expression.
    """
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except (re.error, TypeError) as error:
            raise ValueError(
                f"names_to_exclude holds {pattern!r}, which is not a regular expression: {error}."
            ) from error
    return [name for name in names if not any(pattern.search(name) for pattern in compiled)]


def _quota_of_ratio(keep_ratio: float, pool: int) -> int:
    is_number = isinstance(keep_ratio, Real) and not isinstance(keep_ratio, bool)
    if not (is_number and 0 < keep_ratio <= 1):
        raise ValueError(
            f"keep_ratio={keep_ratio!r} is not a number in (0, 1]: it is the fraction to keep of "
            f"{pool:,} entries. To ask for a count, use num_trainable."
        )
    return max(1, round(float(keep_ratio) * pool))


def _quota_of_total(num_trainable: int | None, pool: int, num_dense: int) -> int:
    if (
        not isinstance(num_trainable, Integral)
        or isinstance(num_trainable, bool)
        or not num_dense < num_trainable <= num_dense + pool
    ):
        raise ValueError(
            f"num_trainable={num_trainable!r} must be an integer from {num_dense + 1:,} to "
            f"{num_dense + pool:,}: {num_dense:,} entries are always trained because their tensors "
            f"match names_to_exclude, and 1 to {pool:,} others can be selected. Change "
            "num_trainable or names_to_exclude."
        )
    return int(num_trainable) - num_dense
