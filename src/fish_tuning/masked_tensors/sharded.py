"""Values that `fully_shard` (FSDP2) has divided among processes.

Each process holds a part of every parameter. A forward pass needs all values of a group: one
exchange brings them together, one averages their gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fish_tuning.engines import is_away, is_in_zero_3
from fish_tuning.masked_tensors import zero3

_DIVIDED = "_fish_divided"
"""Attribute of a complete parameter that holds fully_shard's record of it."""


def note_shards(modules: Iterable[nn.Module]) -> set[torch.dtype]:
    """Note where the parts of parameters are that `fully_shard` has completed for a while.

    It completes those of the model itself before any hook of ours can run. What is written into
    them would be gone with them.

    Returns:
        The types that mixed-precision policies cast parameters to.
    """
    dtypes = set()
    for module in modules:
        if (get_state := getattr(module, "_get_fsdp_state", None)) is None:
            continue
        state = get_state()
        dtypes.add(state._mp_policy.param_dtype)
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for record in (record for group in groups if group for record in group.fsdp_params):
            if (complete := getattr(record, "_unsharded_param", None)) is not None:
                setattr(complete, _DIVIDED, record)
    return dtypes - {None}


def is_sharded(values: Tensor) -> bool:
    """Whether this process holds a part of the values, as a DTensor."""
    return type(values) is not nn.Parameter and hasattr(values, "full_tensor")


def trained(values: Any) -> Any:
    """What is trained of a parameter: its part, where `fully_shard` has completed it for a while.

    A complete parameter may be out of date, or rounded by a mixed-precision policy, and a gradient
    may reach it too late to be exchanged.
    """
    record = getattr(values, _DIVIDED, None)
    return values if record is None else record.sharded_param


def check_whole(values: Iterable[Any], refused: str) -> None:
    """Check that no engine has divided values among processes.

    Args:
        values: The values.
        refused: What cannot be done with a model that is divided, for the message.

    Raises:
        RuntimeError: One has.
    """
    for value in values:
        in_zero_3 = is_in_zero_3(value)
        if in_zero_3 or is_sharded(trained(value)):
            engine = "DeepSpeed ZeRO-3" if in_zero_3 else "fully_shard"
            raise RuntimeError(
                f"{refused} a model that {engine} has divided among the processes: save the "
                "model, and load it again in a program without it"
            )


def gathered(values: list[Any], sizes: list[int], agreed: Tensor) -> Tensor:
    """All values in one flat tensor; where `fully_shard` divides them, all processes have to call.

    Args:
        values: The parameters.
        sizes: How many numbers each has in all processes together.
        agreed: The numbers to take for parameters that DeepSpeed ZeRO-3 holds elsewhere.

    Raises:
        RuntimeError: Somebody has replaced them by more or fewer numbers, or an engine other than
            `fully_shard` has left a part of them only.
    """
    values = [trained(value) for value in values]
    parts = [value.detach() for value in values] if len(values) == 1 else values
    if any(is_sharded(value) for value in values):
        full = _complete([value for value in values if is_sharded(value)])
        parts = [next(full) if is_sharded(value) else value for value in values]
    if any(is_away(value) for value in values):
        known = zip(values, parts, agreed.split(sizes), strict=True)
        parts = [last if is_away(value) else part for value, part, last in known]
    for part, size in zip(parts, sizes, strict=True):
        if part.numel() != size:
            if part.numel() > size:
                raise RuntimeError(
                    f"a parameter for the values of {size} selected entries holds {part.numel()} "
                    "numbers: write a whole tensor as load_state_dict does, or call "
                    "remove_mask(model) first"
                )
            raise RuntimeError(
                f"this process holds {part.numel()} of {size} trained values: a masked model "
                "trains under DistributedDataParallel, fully_shard (FSDP2) and DeepSpeed, but not "
                "under FullyShardedDataParallel (FSDP1)"
            )
    if len({part.ndim for part in parts}) > 1:
        parts = [part.reshape(-1) for part in parts]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).reshape(-1)


def assign(value: Any, new: Tensor) -> None:
    """Write numbers into a parameter, or this process's part of them, unseen by autograd."""
    if (divided := getattr(value, _DIVIDED, None)) is not None:
        assign(divided.sharded_param, new)
    if is_sharded(value):
        value.to_local().data.copy_(_local(value, new.view(value.shape)))
        return
    if is_in_zero_3(value):
        zero3.assign_slice(value, new)
    if not is_away(value):
        value.data.copy_(new.view(value.shape))


def averaged_gradients(
    values: Sequence[Any], gradients: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """Gradients of parameters, averaged over processes where `fully_shard` divides them."""
    divided = {
        i: gradient
        for i, (value, gradient) in enumerate(zip(values, gradients, strict=True))
        if gradient is not None and is_sharded(value)
    }
    if not divided:
        return gradients
    mesh = values[next(iter(divided))].device_mesh
    flat = torch.cat([gradient.reshape(-1) for gradient in divided.values()])
    for dimension in range(mesh.ndim):
        dist.all_reduce(flat, group=mesh.get_group(dimension))
    flat /= mesh.size()
    parts = flat.split([gradient.numel() for gradient in divided.values()])
    averaged = {
        i: _distributed(values[i], part.view(gradient.shape))
        for (i, gradient), part in zip(divided.items(), parts, strict=True)
    }
    return [averaged.get(i, gradient) for i, gradient in enumerate(gradients)]


def _complete(shards: list[Any]) -> Any:
    """The full tensors of shards, with a single exchange where they are cut the usual way."""
    from torch.distributed.tensor import Shard

    if not shards or any(
        s.device_mesh.ndim != 1
        or s.placements != (Shard(0),)
        or s.device_mesh != shards[0].device_mesh
        for s in shards
    ):
        return iter([shard.full_tensor().detach() for shard in shards])
    mesh = shards[0].device_mesh
    counts = [[_share(shard, rank, mesh.size()) for shard in shards] for rank in range(mesh.size())]
    length = max(sum(each) for each in counts)
    local = torch.cat([shard.to_local().detach().reshape(-1) for shard in shards])
    sent = local.new_zeros(length)
    sent[: len(local)] = local
    received = [torch.empty_like(sent) for _ in counts]
    dist.all_gather(received, sent, group=mesh.get_group())
    by_rank = [part[: sum(each)].split(each) for part, each in zip(received, counts, strict=True)]
    return iter([torch.cat(parts) for parts in zip(*by_rank, strict=True)])


def _share(shard: Any, rank: int, count: int) -> int:
    """How many numbers a process holds of a tensor cut along its first dimension."""
    rows: int = shard.shape[0]
    chunk = -(-rows // count)
    return max(0, min(chunk, rows - rank * chunk)) * int(shard.numel() // max(rows, 1))


def _distributed(like: Any, tensor: Tensor) -> Any:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def _local(like: Any, tensor: Tensor) -> Tensor:
    local: Tensor = _distributed(like, tensor).to_local()
    return local
