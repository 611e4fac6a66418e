"""Values that DeepSpeed ZeRO-3 has divided among processes.

ZeRO-3 keeps a slice of every parameter in each process. It brings the parameter together while a
module needs it, and leaves an empty tensor in its place otherwise. No module computes with the
values, so the forward pass gathers them here. At other times, a process may be alone (the first one
writes files), and goes by the numbers on which values and tensors last agreed: only DeepSpeed's own
steps can change values that are away.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fish_tuning.engines import is_away

if TYPE_CHECKING:
    from fish_tuning.masked_tensors.storage import Group


def gather(groups: Iterable[Group]) -> None:
    """Bring values that are away together, until DeepSpeed's next step. All processes call."""
    away: list[Any] = [v for group in groups for v in group.values() if is_away(v)]
    for value in away:
        # Otherwise each pass through their module would divide them, and gather them again.
        value.ds_persist = True
    if away:
        away[0].all_gather(away)


@torch.no_grad()
def assign_slice(value: Any, new: Tensor) -> None:
    """Write this process's slice of new numbers where ZeRO-3 gathers a parameter from.

    Raises:
        RuntimeError: ZeRO-3 keeps the slices on disk.
    """
    held = value.ds_tensor
    if held.numel() < held.ds_numel:
        raise RuntimeError(
            "DeepSpeed keeps the trained values on disk (offload_param to nvme), out of reach of "
            "what is written into their tensors: load weights before the engine takes the model"
        )
    start = held.numel() * value.ds_zero_partition_rank
    mine = new.reshape(-1)[start : start + held.numel()]
    held.data[: mine.numel()].copy_(mine)
