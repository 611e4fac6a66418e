"""LoRA layers that contribute nothing do without their adapter in the forward pass.

The term B A x of a layer whose B is 0, with no entry of A or B trained, is 0 and stays 0. Without
it the model computes the same: a mask that leaves whole layers out saves their adapters' time, most
of which goes into adding zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def leave_out_idle_layers(model: nn.Module, mask: Mapping[str, Tensor]) -> list[RemovableHandle]:
    """Hooks the plain LoRA layers whose adapter contributes nothing.

    Variants of LoRA (DoRA acts through its magnitude), layers with a bias on B and quantised
    layers compute as before.

    Args:
        model: The model, masked.
        mask: Parameter name to boolean tensor.

    Returns:
        Handles that take the hooks off.
    """
    untrained = {name for name, bits in mask.items() if not bits.any()}
    idle = [
        _IdleLayer(layer, adapter)
        for path, layer in model.named_modules()
        if type(layer).forward is Linear.forward
        for adapter, b in layer.lora_B.items()
        if adapter not in layer.lora_variant
        and {f"{path}.lora_{side}.{adapter}.weight" for side in "AB"} <= untrained
        and b.bias is None
        and not b.weight.any()
    ]
    return [handle for layer in idle for handle in layer.handles]


class _IdleLayer:
    """Takes one adapter off the active ones of a layer for the time of its forward pass."""

    def __init__(self, layer: Any, adapter: str) -> None:
        self.adapter, self.idle = adapter, True
        self.active: str | list[str] = []
        self.handles: list[RemovableHandle] = [
            layer.register_forward_pre_hook(self._before_forward),
            layer.register_forward_hook(self._after_forward, always_call=True),
            layer.lora_B[adapter].register_load_state_dict_post_hook(self._after_load),
        ]

    def _before_forward(self, layer: Any, args: Any) -> None:
        self.active = layer._active_adapter
        if self.idle:
            layer._active_adapter = [n for n in layer.active_adapters if n != self.adapter]

    def _after_forward(self, layer: Any, args: Any, output: Any) -> None:
        layer._active_adapter = self.active

    def _after_load(self, b: nn.Linear, incompatible_keys: Any) -> None:
        self.idle = not b.weight.any()
