"""What becomes of gradients where a mask selects a part of each tensor, without the mask itself."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fish_tuning.masked_tensors.storage import neighbours


class MaskedGradients:
    """Gathers the gradients of a mask's tensors during a backward pass, as `storage.Group` does.

    The dense gradients of a group are gone once all of them are there and those of its selected
    entries have been taken.

    Args:
        tensors: The tensors that the mask selects from.
        selected: The number of selected entries.
    """

    def __init__(self, tensors: Mapping[str, nn.Parameter], selected: int) -> None:
        entries = sum(tensor.numel() for tensor in tensors.values())
        self._groups = neighbours(tensors.values(), lambda tensor: tensor)
        self._waiting: list[dict[nn.Parameter, Tensor]] = [{} for _ in self._groups]
        self._selected = [
            round(selected * sum(tensor.numel() for tensor in group) / entries)
            for group in self._groups
        ]
        self._values: dict[int, Tensor] = {}
        for number, group in enumerate(self._groups):
            for tensor in group:
                tensor.register_post_accumulate_grad_hook(
                    lambda tensor, number=number: self._receive(number, tensor)
                )

    def finish(self) -> None:
        """Gather the groups of which some tensors had no gradient."""
        for number, waiting in enumerate(self._waiting):
            if waiting:
                self._gather(number)

    def _receive(self, number: int, tensor: nn.Parameter) -> None:
        assert tensor.grad is not None
        self._waiting[number][tensor] = tensor.grad
        tensor.grad = None
        if len(self._waiting[number]) == len(self._groups[number]):
            self._gather(number)

    def _gather(self, number: int) -> None:
        gradients = [gradient.reshape(-1) for gradient in self._waiting[number].values()]
        dense = gradients[0] if len(gradients) == 1 else torch.cat(gradients)
        # The index is the mask's: it exists all along.
        values = dense.new_empty(self._selected[number])
        if number in self._values:
            values = self._values[number].add_(values)
        self._values[number] = values
        self._waiting[number].clear()
