"""4-bit layers on a processor, kept in the form that gradients pass through."""

from typing import Any

from torch import nn


def keep_differentiable(model: nn.Module) -> None:
    """Make sure that gradients pass through a model's 4-bit layers on a processor.

    On a processor with AVX512-BF16, bitsandbytes (0.50) permanently repacks a 4-bit layer when it
    is first evaluated, for a kernel that has no backward pass. The layers before it would then get
    no gradients through it, without an error. Layers that are repacked already are restored.

    Args:
        model: Any model; nothing happens without 4-bit layers.
    """
    module: Any
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        state = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            module.state_dict()  # Unpacks the weight in place, to save it.
