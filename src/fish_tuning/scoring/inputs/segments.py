"""Where the examples of a batch are, if its rows hold several.

Collators that avoid padding put examples one after the other into a row: transformers'
`DataCollatorWithFlattening`, and TRL's `packing` and `padding_free`. Where an example starts is
told by `position_ids` that start again, by `seq_idx`, by `cu_seq_lens_q`, or by an attention mask
that numbers the examples.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fish_tuning.scoring.inputs.batches import IGNORED, LABELS, Batch
from fish_tuning.scoring.inputs.padding import first_tokens

POSITIONS = "position_ids"
MASK = "attention_mask"
CU_SEQ_LENS = ("cu_seq_lens_q", "cu_seq_lens_k")

BORDERS = {"seq_idx", *CU_SEQ_LENS, "max_length_q", "max_length_k"}
"""Entries that say nothing but where examples start."""

WAY_OUT = "give one example a row, padded"


class Segment(NamedTuple):
    """One example: the tokens `start` to `stop` (exclusive) of a row."""

    row: int
    start: int
    stop: int


def find_segments(batch: Batch, pad_id: int | None = None) -> list[Segment] | None:
    """The examples of a batch, row by row, or None if every row is one example.

    Padding belongs to no example: tokens that a 2-D attention mask marks with 0, that `seq_idx`
    marks with a negative number or that `cu_seq_lens_q` leaves out, and positions of 0 at the end
    of a row, with which TRL fills up a row. A row with one label of its own is one example, even
    if its positions start again (a pair of sentences).

    Args:
        batch: The batch.
        pad_id: The token id of padding, if it is known.

    Raises:
        ValueError: The rows hold several examples, and it is not clear which.
    """
    shape = shape_of_text(batch) if isinstance(batch, Mapping) else None
    if shape is None or not isinstance(batch, Mapping):
        return None
    if _row_is_labeled(batch, shape):
        return None
    mask = _by_token(batch, MASK, shape)
    real = torch.ones(shape, dtype=torch.bool) if mask is None else mask != 0
    starts, real = _starts(batch, mask, real)
    if not starts or not bool(real.any()):
        return None
    segments = list(_segments(_agreeing(starts, real), real))
    if mask is None:
        segments = _without_tail(segments, batch, shape, pad_id)
    labels = batch.get(LABELS)
    other = labels if isinstance(labels, Tensor) and labels.shape[:2] != shape else None
    if _one_a_row(segments, real) and (other is not None or not BORDERS & batch.keys()):
        return None
    if other is not None:
        raise ValueError(
            f"rows of {shape[1]} tokens hold {len(segments)} examples, and labels of shape "
            f"{tuple(other.shape)} cannot be divided among them: {WAY_OUT}"
        )
    return segments


def _starts(
    batch: Mapping[str, Any], mask: Tensor | None, real: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """What each entry says about where examples start, and which tokens are not padding."""
    shape = real.shape[0], real.shape[1]
    starts: dict[str, Tensor] = {}
    if mask is not None and _numbers_examples(mask):
        starts[MASK] = _changes(mask)
    if (numbers := _by_token(batch, "seq_idx", shape)) is not None:
        real = real & (numbers >= 0)
        starts["seq_idx"] = _changes(numbers)
    if isinstance(ends := batch.get(CU_SEQ_LENS[0]), Tensor):
        starts[CU_SEQ_LENS[0]], covered = _of_cumulative_lengths(ends, batch, shape)
        real = real & covered
    positions = batch.get(POSITIONS)
    if isinstance(positions, Tensor) and positions.dim() == 3:
        _check_spatial(positions.cpu(), real, starts)
    elif (positions := _by_token(batch, POSITIONS, shape)) is not None:
        starts[POSITIONS] = _of_positions(positions, real)
    return starts, real


def _row_is_labeled(batch: Mapping[str, Any], shape: tuple[int, int]) -> bool:
    """Whether every row has a label of its own, and so is one example."""
    labels = batch.get(LABELS)
    if not isinstance(labels, Tensor) or labels.shape[:2] == shape or BORDERS & batch.keys():
        return False
    by_row = labels.dim() == 1 or (labels.dim() == 2 and labels.is_floating_point())
    return by_row and len(labels) == shape[0]


def shape_of_text(batch: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and tokens of what a language model reads; None if the batch has no text."""
    for key in ("input_ids", "inputs_embeds", LABELS, POSITIONS, "seq_idx"):
        value = batch.get(key)
        if isinstance(value, Tensor) and value.dim() == (3 if key == "inputs_embeds" else 2):
            return value.shape[0], value.shape[1]
    return None


def _by_token(batch: Mapping[str, Any], key: str, shape: tuple[int, int]) -> Tensor | None:
    """An entry with one number per token, on the CPU; one row stands for all rows."""
    value = batch.get(key)
    if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[1] != shape[1]:
        return None
    return value.cpu().expand(shape) if len(value) in (1, shape[0]) else None


def _numbers_examples(mask: Tensor) -> bool:
    """Whether a mask is 1 for the first example of a row, 2 for the second, and so on.

    Longformer's masks also have a 2, for tokens that see the whole row.
    """
    if mask.is_floating_point() or int(mask.max()) < 2:
        return False
    steps = mask.diff(dim=1)
    counted = ((steps == 0) | (steps == 1) | (mask[:, 1:] == 0)).all()
    return bool(counted) and bool((mask[:, 0] == 1).all())


def _changes(numbers: Tensor) -> Tensor:
    """Marks the tokens whose number differs from the one before, and the first of each row."""
    first = torch.ones_like(numbers[:, :1], dtype=torch.bool)
    return torch.cat([first, numbers[:, 1:] != numbers[:, :-1]], 1)


def _of_cumulative_lengths(
    lengths: Tensor, batch: Mapping[str, Any], shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Where examples start, and which tokens belong to one; rows are joined end to end."""
    keys = batch.get(CU_SEQ_LENS[1])
    rows, width = shape
    ends = lengths.flatten().tolist()
    fits = ends[:1] == [0] and ends == sorted(ends) and ends[-1] <= rows * width
    row_starts = range(0, ends[-1], width) if fits else ()
    if (
        not fits
        or not set(row_starts) <= set(ends)
        or (isinstance(keys, Tensor) and keys.tolist() != ends)
    ):
        raise ValueError(
            f"cu_seq_lens_q={ends} does not divide a batch of {rows} rows of {width} tokens into "
            f"examples: {WAY_OUT}"
        )
    starts = torch.zeros(rows * width, dtype=torch.bool)
    starts[[start for start in ends if start < ends[-1]]] = True
    return starts.view(shape), (torch.arange(rows * width) < ends[-1]).view(shape)


def _of_positions(positions: Tensor, real: Tensor) -> Tensor:
    """Where positions start again, at the lowest position of the batch.

    Raises:
        ValueError: They go down in another way.
    """
    starts = torch.zeros_like(real)
    lowest = int(positions[real].min()) if bool(real.any()) else 0
    jumps = False
    for row in range(len(real)):
        tokens = real[row].nonzero().flatten()
        here = positions[row, tokens]
        again = here[1:] <= here[:-1]
        starts[row, tokens[1:][again]] = True
        # Positions may or may not count padding inside a row.
        jumps |= bool((here.diff() > tokens.diff()).any())
    if not bool(starts.any()):
        return starts
    wrong = starts & (positions != lowest)
    if bool(wrong.any()):
        row, token = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids of row {row} go down to {int(positions[row, token])} at token {token}, "
            f"where no example can start, since the lowest position is {lowest}: {WAY_OUT}"
        )
    if jumps or bool((_normal(starts, real) == real).all()):
        how = "leave some out" if jumps else "never count up"
        raise ValueError(
            f"position_ids start again within a row and {how}, so it is not clear where its "
            f"examples start: {WAY_OUT}"
        )
    return starts


def _check_spatial(positions: Tensor, real: Tensor, starts: Mapping[str, Tensor]) -> None:
    """Refuses several examples in a row that has positions in time and space (M-RoPE)."""
    time = positions[0]
    again = torch.zeros_like(real)
    if time.shape == real.shape and bool(real.any()):
        again[:, 1:] = (time[:, 1:] < time[:, :-1]) & (time[:, 1:] == time[real].min())
    if any(bool((_normal(marks, real).sum(1) > 1).any()) for marks in [*starts.values(), again]):
        raise ValueError(
            f"position_ids of shape {tuple(positions.shape)} (M-RoPE) in rows that hold several "
            f"examples cannot be divided: {WAY_OUT}"
        )


def _agreeing(starts: Mapping[str, Tensor], real: Tensor) -> Tensor:
    """The starts, if all that tell them agree.

    Raises:
        ValueError: They do not.
    """
    (name, first), *others = starts.items()
    for other, marks in others:
        if not torch.equal(_normal(marks, real), _normal(first, real)):
            raise ValueError(
                f"{name} and {other} disagree about where the examples of a row start: keep the "
                f"one that is right, or {WAY_OUT}"
            )
    return _normal(first, real)


def _normal(starts: Tensor, real: Tensor) -> Tensor:
    """Starts of examples among real tokens; a row's first real token always is one."""
    return (starts & real) | first_tokens(real)


def _segments(starts: Tensor, real: Tensor) -> Iterator[Segment]:
    """The examples: each ends where the next starts, or with the row's last real token."""
    for row in range(len(starts)):
        tokens = real[row].nonzero().flatten()
        if len(tokens) == 0:
            continue
        at = starts[row].nonzero().flatten().tolist()
        for start, following in zip(at, [*at[1:], real.shape[1]], strict=True):
            within = tokens[(tokens >= start) & (tokens < following)]
            yield Segment(row, start, int(within[-1]) + 1)


def _without_tail(
    segments: list[Segment], batch: Mapping[str, Any], shape: tuple[int, int], pad_id: int | None
) -> list[Segment]:
    """The examples without the padding at the end of a row, where each token looks like one."""
    ids, labels = _by_token(batch, "input_ids", shape), _by_token(batch, LABELS, shape)
    kept = []
    for row in range(shape[0]):
        of_row = [segment for segment in segments if segment.row == row]
        tail = 0
        token = None if ids is None else int(ids[row, -1])
        for segment in reversed(of_row[1:]):
            at = segment.start
            if (
                segment.stop != at + 1
                or (ids is not None and int(ids[row, at]) != token)
                or (labels is not None and int(labels[row, at]) != IGNORED)
            ):
                break
            tail += 1
        # A single token may be an example, whose score is 0.
        is_padding = tail > 1 or token is None or pad_id is None or token == pad_id
        kept += of_row[: len(of_row) - tail] if is_padding else of_row
    return kept


def _one_a_row(segments: list[Segment], real: Tensor) -> bool:
    """Whether every row is one example, with no padding but what the attention mask marks."""
    inside = torch.zeros_like(real)
    for row, start, stop in segments:
        inside[row, start:stop] = True
    rows = [segment.row for segment in segments]
    return rows == list(range(len(real))) and not bool((real & ~inside).any())
