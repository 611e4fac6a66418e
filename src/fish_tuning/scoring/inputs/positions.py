"""Position ids for batches that are padded on the left."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fish_tuning.scoring.inputs.batches import Batch, take, with_tensors


def is_padded_left(mask: Any) -> bool:
    """Whether an attention mask (b, t) starts with padding in any example."""
    return isinstance(mask, Tensor) and mask.dim() == 2 and bool((mask[:, 0] == 0).any())


def positions_from_mask(mask: Tensor) -> Tensor:
    """Positions (b, t) that start at 0 where an example's padding on the left ends."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def skipping_padding_helps(logits_of: Callable[[Mapping[str, Any]], Any], batch: Batch) -> bool:
    """Whether position ids that skip padding make an example what it is without padding.

    That depends on the model: learned positions count the padding unless told otherwise, and
    models with positions of their own (M-RoPE) are wrong if told. So one example is compared with
    the same example without its padding.

    Args:
        logits_of: Calls the model.
        batch: A batch with padding on the left.
    """
    assert isinstance(batch, Mapping)
    row = int((batch["attention_mask"][:, 0] == 0).nonzero()[0])
    try:
        padded = take(batch, slice(row, row + 1))
    except ValueError:
        return False
    assert isinstance(padded, Mapping)
    mask = padded["attention_mask"]
    width, start = mask.shape[1], int((mask[0] != 0).int().argmax())

    def cut(value: Tensor) -> Tensor:
        by_token = value.dim() > 1 and value.shape[:2] == (1, width)
        return value[:, start:] if by_token else value

    alone = logits_of(with_tensors(padded, cut))
    if not isinstance(alone, Tensor):
        return False
    as_given, skipping = (
        float((logits_of(arguments)[:, -alone.shape[1] :] - alone).abs().max())
        for arguments in (padded, {**padded, "position_ids": positions_from_mask(mask)})
    )
    allowed = max(1e-3, 8 * torch.finfo(alone.dtype).eps) * float(alone.abs().max())
    return skipping <= allowed and skipping <= max(as_given, 0.01 * allowed)
