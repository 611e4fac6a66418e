"""Position ids for batches that are padded on the left."""

from collections.abc import Callable, Mapping
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor

from fish_tuning.scoring.inputs.batches import IGNORED, Batch, take, with_tensors
from fish_tuning.scoring.inputs.padding import first_after_padding


class LeftPadding(Enum):
    """What padding on the left does to the outputs of a model."""

    IGNORED = auto()
    """The outputs are those of the example without padding."""

    SKIPPED = auto()
    """They are if position ids skip the padding, as those of `generate` do."""

    COUNTED = auto()
    """It changes them."""


def is_padded_left(mask: Any) -> bool:
    """Whether an attention mask (b, t) starts with padding in any example that has text."""
    return isinstance(mask, Tensor) and mask.dim() == 2 and bool(_is_padded_left(mask).any())


def positions_from_mask(mask: Tensor) -> Tensor:
    """Positions (b, t) that start at 0 where an example's padding on the left ends."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def reads_padding(mask: Tensor, labels: Any, *, first_token: bool) -> bool:
    """Whether a language model's loss reads the outputs of padding.

    Args:
        mask: The attention mask, (b, t).
        labels: The labels.
        first_token: Whether the loss has a term for the first token after padding on the left.
    """
    if not isinstance(labels, Tensor) or labels.shape != mask.shape:
        return False
    real = mask != 0
    read = ~real
    if first_token:
        # Nothing is before the first token of an example without padding.
        read = read | first_after_padding(real)
    return bool((read & (labels != IGNORED)).any())


@torch.no_grad()
def left_padding(
    logits_of: Callable[[Mapping[str, Any]], Any], batch: Batch, *, may_skip: bool
) -> LeftPadding:
    """What padding on the left does, found by comparing an example with and without it.

    That depends on the model: learned positions count the padding unless told otherwise, and
    models with positions of their own (M-RoPE) are wrong if told.

    Args:
        logits_of: Calls the model.
        batch: A batch with padding on the left.
        may_skip: Whether to try position ids.
    """
    assert isinstance(batch, Mapping)
    row = int(_is_padded_left(batch["attention_mask"]).nonzero()[0])
    try:
        padded = take(batch, slice(row, row + 1))
    except ValueError:
        return LeftPadding.COUNTED
    assert isinstance(padded, Mapping)
    mask = padded["attention_mask"]
    width, start = mask.shape[1], int((mask[0] != 0).int().argmax())

    def cut(value: Tensor) -> Tensor:
        by_token = value.dim() > 1 and value.shape[:2] == (1, width)
        return value[:, start:] if by_token else value

    alone = logits_of(with_tensors(padded, cut))
    if not isinstance(alone, Tensor):
        return LeftPadding.COUNTED
    if alone.dim() == 3 and alone.shape[1] != width - start:
        # Prompt tuning puts virtual tokens before the padding, which separates them from the text.
        return LeftPadding.COUNTED

    def difference(arguments: Mapping[str, Any]) -> float:
        return float((logits_of(arguments)[:, -alone.shape[1] :] - alone).abs().max())

    allowed = max(1e-3, 8 * torch.finfo(alone.dtype).eps) * float(alone.abs().max())
    as_given = difference(padded)
    if may_skip:
        skipping = difference({**padded, "position_ids": positions_from_mask(mask)})
        if skipping <= allowed and skipping <= max(as_given, 0.01 * allowed):
            return LeftPadding.SKIPPED
    return LeftPadding.IGNORED if as_given <= allowed else LeftPadding.COUNTED


def _is_padded_left(mask: Tensor) -> Tensor:
    """Which examples start with padding and have text, (b,)."""
    return (mask[:, 0] == 0) & (mask != 0).any(1)
