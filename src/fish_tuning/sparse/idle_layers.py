"""LoRA layers that contribute nothing skip their adapter in the forward pass.

The term B A x of a layer whose B is 0, with no entry of A or B trained, is 0 and stays 0. The
model computes the same without it: a mask that leaves out whole layers saves the time of their
adapters, most of which goes into adding zeros. While a layer's dropout draws random numbers, the
layer runs: all numbers drawn after them would be others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class IdleLayers:
    """The plain LoRA layers of a model of whose adapter nothing is trained.

    Variants of LoRA (DoRA acts through its magnitude), layers with a bias on B and quantized
    layers compute as before.
    """

    def __init__(self) -> None:
        self.layers: list[_IdleLayer] = []
        self.running = False
        """Whether a forward pass of the model is running, before which `look` was called."""

    def add(self, model: nn.Module, mask: Mapping[str, Tensor]) -> None:
        """Watch the layers of which a mask, applied to the model, trains nothing."""
        untrained = {name for name, bits in mask.items() if not bits.any()}
        self.layers += [
            _IdleLayer(self, layer, adapter)
            for path, layer in model.named_modules()
            if type(layer).forward is Linear.forward
            for adapter, b in layer.lora_B.items()
            if adapter not in layer.lora_variant
            and {f"{path}.lora_{side}.{adapter}.weight" for side in "AB"} <= untrained
            and b.bias is None
        ]

    def look(self) -> None:
        """See which layers' B is zero now, as anybody may have written it."""
        layers = [layer for layer in self.layers if layer.weight is not None]
        by_device: dict[torch.device, list[_IdleLayer]] = {}
        for layer in layers:
            by_device.setdefault(layer.weight.device, []).append(layer)
        for same in by_device.values():
            # One wait for an accelerator, instead of one for each layer.
            found = torch.stack([layer.weight.detach().any() for layer in same]).tolist()
            for layer, contributes in zip(same, found, strict=True):
                layer.idle = not contributes

    def end_pass(self) -> None:
        """Leave every layer as it was before the forward pass of the model."""
        self.running = False
        for layer in self.layers:
            layer.restore()

    def release(self, modules: Iterable[nn.Module]) -> None:
        """Forget layers whose A or B is one of the modules: it may be trained from now on."""
        released = set(modules)
        for layer in [layer for layer in self.layers if released & layer.sides]:
            layer.remove()
            self.layers.remove(layer)


class _IdleLayer:
    """Takes one adapter off the active ones of a layer while its forward pass runs."""

    def __init__(self, layers: IdleLayers, layer: Any, adapter: str) -> None:
        self.layers, self.layer, self.adapter = layers, layer, adapter
        self.sides = {layer.lora_A[adapter], layer.lora_B[adapter]}
        self.idle = False
        self.active: str | list[str] = []
        """The layer's active adapters, before its forward pass."""
        self.skipping = False
        """Whether the layer runs without the adapter now."""
        self.handles: list[RemovableHandle] = [
            layer.register_forward_pre_hook(self._before_forward),
            layer.register_forward_hook(self._after_forward, always_call=True),
        ]

    @property
    def weight(self) -> Any:
        """The weight of B, or None if the adapter is gone or another has its name."""
        held = self.layer.lora_B
        is_ours = self.adapter in held and held[self.adapter] in self.sides
        return held[self.adapter].weight if is_ours else None

    def remove(self) -> None:
        self.restore()
        for handle in self.handles:
            handle.remove()

    def restore(self) -> None:
        """Give the layer its active adapters back, also after an interrupted pass."""
        if self.skipping:
            self.layer._active_adapter, self.skipping = self.active, False

    def _draws(self) -> bool:
        """Whether its dropout draws random numbers, without which other layers draw others."""
        dropout = self.layer.lora_dropout[self.adapter]
        return isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0

    def _before_forward(self, layer: Any, args: Any) -> None:
        if not self.layers.running and not torch.compiler.is_compiling():
            # A layer called by itself, or run again by checkpointing.
            self.idle = self.weight is not None and not self.weight.any()
        if self.idle and not self._draws() and not torch.jit.is_tracing():
            self.active, self.skipping = layer._active_adapter, True
            layer._active_adapter = [n for n in layer.active_adapters if n != self.adapter]

    def _after_forward(self, layer: Any, args: Any, output: Any) -> None:
        self.restore()
