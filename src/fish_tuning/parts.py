"""Tensors that `fully_shard` (FSDP2) divides among processes, and the rows that this one holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fish_tuning.distributed import explaining_failure


class Part:
    """The rows of a tensor that this process holds.

    Of an ordinary tensor, every process holds all rows. `fully_shard` makes a tensor a DTensor and
    cuts it along its first dimension: equally many rows in each process, fewer or none in the last
    ones. On a mesh of two dimensions (HSDP), several processes hold the same rows.

    Args:
        tensor: The tensor, or this process's view of it.

    Attributes:
        local: This process's rows; they share the tensor's memory.
        group: The processes that hold the other rows; None if there are no others.

    Raises:
        ValueError: The tensor is divided in another way.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._whole = cast(Any, tensor)
        self.local: Tensor = tensor
        self.group: Any = None
        self._rank, self._size, self._start = 0, 1, 0
        if not is_divided(tensor):
            return
        whole = self._whole
        mesh, placements = whole.device_mesh, whole.placements
        if not are_rows(tensor):
            raise ValueError(
                f"a tensor is divided as {placements}: only rows, as fully_shard divides them by "
                "default, can be scored and selected from"
            )
        self.local = whole.detach().to_local()
        for dimension, placement in enumerate(placements):
            if placement.is_shard():
                self.group = mesh.get_group(dimension)
                self._rank, self._size = mesh.get_local_rank(dimension), mesh.size(dimension)
                rows = tensor.shape[0]
                self._start = min(self._rank * -(-rows // self._size), rows)

    @property
    def mask_device(self) -> torch.device:
        """Where a mask of the whole tensor belongs: a divided tensor may not fit on a device."""
        return torch.device("cpu") if is_divided(self._whole) else self.local.device

    def take(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """This process's part of a tensor whose dimension `dim` goes through all rows."""
        if self.group is None:
            return tensor
        return tensor.narrow(dim, self._start, self.local.shape[0])

    def positions(self, rows: Tensor) -> tuple[Tensor, Tensor | slice]:
        """Those of some rows (n,) that this process holds.

        Returns:
            Their numbers, counted from this process's first row, and where they are among `rows`.
        """
        if self.group is None:
            return rows, slice(None)
        here = (rows >= self._start) & (rows < self._start + self.local.shape[0])
        return rows[here] - self._start, here

    def divided(self, local: Tensor) -> Tensor:
        """A tensor divided like this one, from this process's rows of it."""
        if not is_divided(self._whole):
            return local
        from torch.distributed.tensor import DTensor

        found: Tensor = DTensor.from_local(
            local,
            self._whole.device_mesh,
            self._whole.placements,
            run_check=False,
            shape=self._whole.shape,
            stride=self._whole.stride(),
        )
        return found

    def complete(self, local: Tensor) -> Tensor:
        """The whole tensor, from every process's rows of it. All processes have to call."""
        if not is_divided(self._whole):
            return local
        with explaining_failure():
            whole: Any = self.divided(local)
            found: Tensor = whole.full_tensor()
        return found

    def before(self, count: int) -> tuple[int, int]:
        """The sums of a count over the parts before this one, and over all. All have to call."""
        counts = torch.zeros(1, self._size, dtype=torch.int64)
        counts[0, self._rank] = count
        (counts,) = totals([self], counts)
        return int(counts[: self._rank].sum()), int(counts.sum())


def totals(parts: Sequence[Part], values: Tensor) -> Tensor:
    """Sums over the processes that hold the rows of each part. All processes have to call.

    Args:
        parts: Parts of tensors.
        values: What this process has found in its rows, (len(parts), ...).

    Returns:
        What is found in all rows, with the shape, dtype and device of `values`. A sum of integers
        does not depend on how the tensors are divided.
    """
    for group in dict.fromkeys(part.group for part in parts):
        if group is not None:
            members = [i for i, part in enumerate(parts) if part.group is group]
            # A backend such as NCCL sends only from its own kind of device.
            sent = values[members].to(parts[members[0]].local.device)
            with explaining_failure():
                dist.all_reduce(sent, group=group)
            values = values.index_copy(
                0, torch.tensor(members, device=values.device), sent.to(values.device)
            )
    return values


def whole(tensor: Tensor) -> Tensor:
    """The tensor as every process's own; of a divided one, all processes have to call."""
    part = Part(tensor)
    return part.complete(part.local)


def is_divided(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which each process holds a part."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def are_rows(tensor: Any) -> bool:
    """Whether each process holds consecutive rows of a DTensor, or all of it."""
    from torch.distributed.tensor import Replicate, Shard

    # By type: a strided shard, of tensor parallelism with fully_shard, is a subclass in some
    # versions of torch.
    kinds = [type(placement) for placement in tensor.placements]
    return (
        kinds.count(Shard) + kinds.count(Replicate) == len(kinds)
        and kinds.count(Shard) <= 1
        and all(placement.dim == 0 for placement in tensor.placements if placement.is_shard())
    )
