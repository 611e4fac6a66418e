"""Padding that need not be computed: lengths of examples, and cutting columns."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from fish_tuning.scoring.inputs.batches import IGNORED, LABELS, Batch, take


def parts_by_length(
    batch: Batch,
    numbers: Sequence[int],
    most_examples: int | None,
    most_tokens: int | None = None,
) -> Iterator[tuple[Batch, Sequence[int]]]:
    """Divides a padded batch into parts of similar length, most of which need less padding.

    A batch whose padding cannot be cut (see `without_padding`) stays in one part.

    Args:
        batch: The batch.
        numbers: The number of each example in the calibration set.
        most_examples: The most examples in a part; any number if None.
        most_tokens: The most tokens in a part, its padding included; any number if None. A part
            has at least one example.

    Yields:
        Each part, and the numbers of its examples.
    """
    lengths = _lengths(batch)
    if lengths is None:
        yield batch, numbers
        return
    parts: list[list[int]] = [[]]
    for row in sorted(range(len(numbers)), key=lengths.__getitem__):
        size = len(parts[-1]) + 1
        too_many = most_examples is not None and size > most_examples
        too_long = most_tokens is not None and size * lengths[row] > most_tokens
        if parts[-1] and (too_many or too_long):
            parts.append([])
        parts[-1].append(row)
    for rows in parts:
        yield take(batch, rows), [numbers[row] for row in rows]


def without_padding(batch: Batch) -> Batch:
    """The batch without the columns that are padding in all examples.

    Only padding on the right is cut, and only if every entry with one value per token is known to
    be ignored there.
    """
    lengths = _lengths(batch)
    if lengths is None:
        return batch
    assert isinstance(batch, Mapping)
    shape = batch["attention_mask"].shape
    # Models flatten their labels with `view`, which needs them contiguous.
    return {
        key: value[:, : max(lengths)].contiguous() if _is_per_token(value, shape) else value
        for key, value in batch.items()
    }


def shortest(batch: Batch) -> Batch | None:
    """The example with the most padding, alone; None if the batch has none that can be cut."""
    lengths = _lengths(batch)
    if lengths is None:
        return None
    row = min(range(len(lengths)), key=lengths.__getitem__)
    return take(batch, slice(row, row + 1))


# Entries with one value per token. An unknown key may have as many columns by chance, or values
# that matter where the attention mask is 0.
_BY_TOKEN = {"input_ids", "attention_mask", "token_type_ids", "position_ids"}


def _lengths(batch: Batch) -> list[int] | None:
    """The number of tokens of each example; None if the batch has no padding that can be cut."""
    if not isinstance(batch, Mapping):
        return None
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    if not all(
        isinstance(value, Tensor) and value.shape[:1] == mask.shape[:1] for value in batch.values()
    ):
        return None
    per_token = {key for key, value in batch.items() if _is_per_token(value, mask.shape)}
    if not per_token <= _BY_TOKEN | {LABELS}:
        return None
    real = mask != 0
    padded_elsewhere = real[:, 1:] & ~real[:, :-1]
    if bool(padded_elsewhere.any()):
        return None
    if LABELS in per_token and bool(((batch[LABELS] != IGNORED) & ~real).any()):
        return None
    lengths: list[int] = real.sum(1).tolist()
    return lengths if 0 < min(lengths) < mask.shape[1] else None


def first_tokens(real: Tensor) -> Tensor:
    """Marks the first token of each row that is not padding; `real` (b, t) marks all of them."""
    return real & (real.cumsum(1) == 1)


def first_after_padding(real: Tensor) -> Tensor:
    """Marks the first token of each row that starts with padding."""
    return first_tokens(real) & ~real[:, :1]


def _is_per_token(value: Any, shape: Sequence[int]) -> bool:
    """Whether a value has an entry for each token of a mask of this shape."""
    return isinstance(value, Tensor) and value.shape[:2] == shape
