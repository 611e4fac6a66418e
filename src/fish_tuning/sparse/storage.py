"""Masked tensors in flat storage, their selected entries in one trainable vector.

The tensors of a group lie one behind the other in a flat, frozen ``storage``. The k selected
entries are one trainable vector ``values``; ``index`` says where in the storage they belong. One
autograd node writes ``values`` into the storage and hands out the tensors as views; its backward
gathers the views' gradients at ``index``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fish_tuning.distributed import full_vector

GROUP_ENTRIES = 2**22
"""Small tensors share a node up to this size. A node waits for the gradients of all its tensors,
so that a larger group would keep many dense gradients alive at once."""

RESTING = "fish_resting"

# The tensors that transformers' Trainer excludes from weight decay, by its own patterns; a group
# of such tensors has "bias" in its name and so is excluded too.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)


@dataclass(eq=False)
class MaskedTensor:
    """One tensor taken from the model's parameters: where it belongs and what it is now."""

    name: str
    owners: list[tuple[nn.Module, str]]
    """Modules and attributes that hold it; several if it is tied."""
    keys: list[str]
    """Its names in the model's state dict: one an owner, more if the owner itself is shared."""
    resting: Tensor
    """What the owners hold outside of a forward pass with gradients."""
    required_grad: bool
    entries: slice = field(default_factory=lambda: slice(0))
    """Its part of the group's storage."""
    selected: slice = field(default_factory=lambda: slice(0))
    """Its part of the group's values and index."""

    def install(self, tensor: Tensor) -> None:
        for module, attribute in self.owners:
            module._buffers[attribute] = tensor

    def rest(self, tensor: Tensor) -> None:
        """Makes this what the owners hold outside of a forward pass with gradients."""
        self.resting = tensor
        self.install(tensor)
        for module, _ in self.owners:
            # transformers finds the device of a module without parameters by such an attribute.
            vars(module)[RESTING] = tensor

    def settle(self) -> None:
        """Without a storage of its own, it may have been moved, cast or loaded by itself."""
        module, attribute = self.owners[0]
        held = module._buffers[attribute]
        assert held is not None
        self.rest(held)


class _WriteValues(torch.autograd.Function):
    """values (k,) -> the group's tensors with the values in place; gradients gathered back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Group) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.group = group
        group.write()
        return tuple(tensor.resting.detach() for tensor in group.tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None]:
        group: Group = ctx.group
        flat = [
            group.storage.new_zeros(tensor.resting.numel()) if g is None else g.reshape(-1)
            for tensor, g in zip(group.tensors, gradients, strict=True)
        ]
        dense = flat[0] if len(flat) == 1 else torch.cat(flat)
        return dense.index_select(0, group.index), None


class Group(nn.Module):
    """Masked tensors of one device and type that share a storage and a trainable vector."""

    storage: Tensor
    index: Tensor

    def __init__(self, tensors: list[MaskedTensor], masks: list[Tensor]) -> None:
        super().__init__()
        self.tensors = tensors
        flat, index, entries, selected = [], [], 0, 0
        for tensor, bits in zip(tensors, masks, strict=True):
            flat.append(tensor.resting.detach().reshape(-1))
            index.append(bits.to(flat[-1].device).reshape(-1).nonzero().squeeze(1) + entries)
            tensor.entries = slice(entries, entries := entries + flat[-1].numel())
            tensor.selected = slice(selected, selected := selected + index[-1].numel())
        small = entries < torch.iinfo(torch.int32).max
        # A tensor of its own group stays where it is: a model's own weights are not held twice.
        storage = flat[0] if len(flat) == 1 else torch.cat(flat)
        self.register_buffer("storage", storage, persistent=False)
        self.register_buffer(
            "index", torch.cat(index).to(torch.int32 if small else torch.int64), persistent=False
        )
        self.values = nn.Parameter(self.storage[self.index])

    def view(self, tensor: MaskedTensor) -> Tensor:
        """A masked tensor as it lies in the storage."""
        return self.storage[tensor.entries].view(tensor.resting.shape)

    def views(self) -> tuple[Tensor, ...]:
        """All tensors, up to date, through which gradients reach the values."""
        views: tuple[Tensor, ...] = _WriteValues.apply(self.values, self)  # type: ignore[no-untyped-call]
        # Autograd takes the node that was made last first: this one would have its turn when the
        # backward pass is over, and all dense gradients would wait for it.
        node: Any = None if torch.compiler.is_compiling() else views[0].grad_fn
        if hasattr(node, "_set_sequence_nr"):
            node._set_sequence_nr(2**63)
        return views

    @torch.no_grad()
    def write(self) -> None:
        """Brings the storage, and so every tensor of the model, up to date with the values.

        Through .data: further forward passes, with gradients or without, and state dicts may come
        before a backward, and writing the same values again must not invalidate what it needs.
        """
        values = full_vector(self.values.detach(), len(self.index))
        # It takes int64 alone; converting and copying is faster than all other ways of indexing.
        self.storage.data.index_copy_(0, self.index.long(), values)

    # The state dict has the tensors under the names of their owners, and nothing of the group.

    def _save_to_state_dict(self, *args: Any) -> None:
        pass

    def _load_from_state_dict(self, *args: Any) -> None:
        pass


def take_out(
    model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> tuple[dict[nn.Module, list[str]], list[MaskedTensor]]:
    """Makes parameters buffers; also returns the order in which their owners had them."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    taken: dict[str, MaskedTensor] = {}
    orders: dict[nn.Module, list[str]] = {}
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    for module, prefixes in paths.items():
        for attribute, parameter in list(module._parameters.items()):
            if parameter is None or (name := names.get(id(parameter))) is None:
                continue
            orders.setdefault(module, list(module._parameters))
            resting = parameter.detach()
            tensor = taken.setdefault(
                name, MaskedTensor(name, [], [], resting, parameter.requires_grad)
            )
            tensor.owners.append((module, attribute))
            tensor.keys += [f"{path}.{attribute}" if path else attribute for path in prefixes]
            del module._parameters[attribute]
            module.register_buffer(attribute, tensor.resting)
    for tensor in taken.values():
        tensor.rest(tensor.resting)
    return orders, list(taken.values())


def grouped(tensors: list[MaskedTensor]) -> Iterator[tuple[str, list[MaskedTensor]]]:
    """Neighbours of one device, type and weight decay, up to GROUP_ENTRIES or one tensor."""
    open_groups: dict[Any, list[MaskedTensor]] = {}
    for tensor in tensors:
        undecayed = _NO_DECAY.search(tensor.name) or any(
            isinstance(module, nn.LayerNorm) for module, _ in tensor.owners
        )
        key = tensor.resting.device, tensor.resting.dtype, "bias" if undecayed else "weight"
        group = open_groups.setdefault(key, [])
        if group and sum(t.resting.numel() for t in [*group, tensor]) > GROUP_ENTRIES:
            yield key[-1], group
            group = open_groups[key] = []
        group.append(tensor)
    for key, group in open_groups.items():
        yield key[-1], group
