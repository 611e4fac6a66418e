"""LoRA ranks that contribute nothing are left out of the forward pass.

B A x is a sum over ranks j of B[:, j] (A[j] x). Where B[:, j] is 0 and no entry of it is trained,
its term is 0 and stays 0, and so does the gradient of A[j]. A layer in which that holds for half of
the ranks or more computes the same with smaller matrices, and one without other ranks does without
its adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class LiveRanks(nn.Module):
    """The ranks of one LoRA layer that can contribute; where few, its forward pass uses no other.

    Args:
        layer: PEFT's LoRA layer.
        adapter: Name of the masked adapter in it.
        trained: Which ranks of B have trained entries, shape (r,).
    """

    ranks: Tensor

    def __init__(self, layer: Linear, adapter: str, trained: Tensor) -> None:
        super().__init__()
        self.adapter, self.trained = adapter, trained
        # In a tuple they are no submodules of this one.
        self.sides = cast(
            tuple[nn.Linear, nn.Linear], (layer.lora_A[adapter], layer.lora_B[adapter])
        )
        self._find()
        self.handles: list[RemovableHandle] = []
        if self._narrow:
            self.handles = [
                layer.register_forward_pre_hook(self._before_forward),
                layer.register_forward_hook(self._after_forward, always_call=True),
                self.sides[1].register_load_state_dict_post_hook(self._after_load),
            ]

    @torch.no_grad()
    def _find(self) -> None:
        weight = self.sides[1].weight
        live = self.trained.to(weight.device) | (weight != 0).any(0)
        self.register_buffer("ranks", live.nonzero().squeeze(1), persistent=False)

    @property
    def _narrow(self) -> bool:
        """Whether enough ranks are idle to be worth a copy of the others."""
        return len(self.ranks) <= len(self.trained) // 2

    def _after_load(self, module: nn.Module, incompatible_keys: Any) -> None:
        self._find()

    def _before_forward(self, layer: Linear, args: Any) -> None:
        a, b = self.sides
        self.active = layer._active_adapter
        if not self._narrow or self.adapter not in layer.active_adapters:
            return
        if not len(self.ranks) and b.bias is None:
            layer._active_adapter = [n for n in layer.active_adapters if n != self.adapter]
            return
        # In front of the parameter or buffer of that name, which keeps its place.
        vars(a)["weight"] = a.weight.index_select(0, self.ranks)
        vars(b)["weight"] = b.weight.index_select(1, self.ranks)

    def _after_forward(self, layer: Linear, args: Any, output: Any) -> None:
        layer._active_adapter = self.active
        for side in self.sides:
            vars(side).pop("weight", None)


def leave_out_idle_ranks(model: nn.Module, mask: Mapping[str, Tensor]) -> list[LiveRanks]:
    """Hooks the plain LoRA layers that have ranks without a contribution.

    Variants of LoRA (DoRA) and quantised layers compute with all ranks as before.

    Args:
        model: The model, masked.
        mask: Parameter name to boolean tensor.

    Returns:
        One module for each hooked layer; `handles` takes the hooks off.
    """
    found = [
        LiveRanks(layer, adapter, mask[name].any(0))
        for path, layer in model.named_modules()
        if type(layer).forward is Linear.forward
        for adapter in layer.lora_B
        if adapter not in layer.lora_variant and (name := f"{path}.lora_B.{adapter}.weight") in mask
    ]
    return [live for live in found if live.handles]
