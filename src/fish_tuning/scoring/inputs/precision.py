"""The precision that a model computes in."""

import torch
from torch import nn

from fish_tuning.engines import autocast_dtype
from fish_tuning.sharded_model import ShardedModel


def coarsest_eps(model: nn.Module, device: str, *outputs: torch.dtype) -> float:
    """The relative rounding error of the coarsest floating-point type that a model computes in.

    Args:
        model: The model, whose parameters have some of the types.
        device: The kind of device, on which autocast may be on.
        outputs: The types of its outputs.
    """
    dtypes = [
        *outputs,
        *(p.dtype for p in model.parameters()),
        *ShardedModel(model).dtypes,
        autocast_dtype(device),
    ]
    return max(torch.finfo(d).eps for d in set(dtypes) if d is not None and d.is_floating_point)
