"""Models on several devices, parts of which accelerate's `device_map` may leave on none."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its input: the device of its first parameter that is in memory.

    accelerate's hooks bring offloaded ones there when their module has its turn, and send what
    goes from one device to the next.
    """
    devices = [parameter.device for parameter in model.parameters()]
    return next((device for device in devices if device.type != "meta"), devices[0])


def check_in_memory(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError if some of the tensors are offloaded: nothing can be trained there."""
    offloaded = [name for name, tensor in tensors.items() if tensor.is_meta]
    if offloaded:
        raise ValueError(
            f"{len(offloaded)} trainable tensors are offloaded (on the meta device), the first of "
            f"them {offloaded[0]}: give their modules a device in device_map, or put the adapter "
            "on modules that have one (target_modules, layers_to_transform)"
        )
