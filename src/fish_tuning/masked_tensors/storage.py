"""Masked tensors in flat storage, with one autograd node for each group of them.

The tensors of a group lie one after the other in a flat ``storage``, which is no parameter. The
selected entries of each tensor are a parameter of their own, its ``values``, in the module that
owns the tensor. The node of a forward pass hands out the tensors as views of the storage; its
backward gathers their gradients at ``index``, the places of the selected entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fish_tuning.masked_tensors.sharded import averaged_gradients, trained
from fish_tuning.masked_tensors.tensors import MaskedTensor, View, as_leaf

GROUP_ENTRIES = 2**22
"""Small tensors share a node up to this size. A node waits for the gradients of all its tensors,
so a larger group would keep many dense gradients alive at once."""


T = TypeVar("T")


class Part(NamedTuple):
    """What a group is built from: a tensor, its memory, and its selected entries."""

    tensor: MaskedTensor
    flat: Tensor
    positions: Tensor
    """Places of the selected entries in `flat`."""
    agreed: Tensor
    """Numbers of the selected entries when values and memory last agreed."""


class Group:
    """Masked tensors of one device and type that share a storage and an autograd node."""

    def __init__(self, parts: list[Part]) -> None:
        self.tensors = [part.tensor for part in parts]
        index, entries, selected = [], 0, 0
        for tensor, flat, positions, _ in parts:
            index.append(positions.long() + entries)
            tensor.entries = slice(entries, entries := entries + flat.numel())
            tensor.selected = slice(selected, selected := selected + len(positions))
        small = entries < torch.iinfo(torch.int32).max
        # The only tensor of a group stays where it is: a model's own weights are not held twice.
        self.storage = parts[0].flat if len(parts) == 1 else torch.cat([p.flat for p in parts])
        self.index = torch.cat(index).to(torch.int32 if small else torch.int64)
        self.agreed = torch.cat([part.agreed for part in parts])
        self.version = 0
        """`writes()` when the last forward pass began."""
        self.only_values_cast = False
        """Whether it no longer holds since somebody has cast values, but not their tensors."""
        self.was_bypassed = False
        """Whether gradients have come since the last step from parts of the model, called alone."""
        self.has_conflict = torch.zeros((), dtype=torch.bool, device=self.storage.device)
        for tensor in self.tensors:
            tensor.is_trained = tensor.values.requires_grad
            for view in tensor.views:
                view.leaf = as_leaf(self.view(tensor, view), tensor.is_trained)
                view.install(view.leaf)
        self.attach()

    def attach(self) -> None:
        """Refer tensors and their leaves to the group, as copies and pickles do not."""
        self._held = [
            (vars(place.module), place.attribute, view.leaf, tensor.entries.start, tensor.numel)
            for tensor in self.tensors
            for view, place in tensor.views_and_places()
        ]
        self._tied = [tensor for tensor in self.tensors if tensor.is_tied]
        for tensor in self.tensors:
            tensor.group = self
            for view in tensor.views:
                tensor.receive_from(view, view.leaf)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_held"}

    def is_intact(self) -> bool:
        """Whether its storage holds what the modules hold, and values of the same type."""
        address, itemsize = self.storage.data_ptr(), self.storage.itemsize
        dtype, device = self.storage.dtype, self.storage.device
        # It runs several times in a step, for every tensor.
        for module, attribute, leaf, start, numel in self._held:
            if module.get(attribute) is not leaf or leaf.data_ptr() != address + start * itemsize:
                return False
            values = module["_parameters"].get(attribute)
            if values is None or values.numel() == numel:
                return False
            if values.dtype != dtype or values.device != device:
                return False
        return all(tensor.has_one_parameter() for tensor in self._tied)

    def note_write(self) -> None:
        """Have a backward through an older forward pass fail, as it does without a mask."""
        if not self.storage.is_inference():
            torch.autograd.graph.increment_version(self.storage)

    def writes(self) -> int:
        """How often the storage was written in place; tensors of inference mode do not count."""
        return 0 if self.storage.is_inference() else self.storage._version

    def values(self) -> list[nn.Parameter]:
        """The parameters of its tensors."""
        return [tensor.values for tensor in self.tensors]

    def trained(self) -> list[Any]:
        """What optimizers hold of these parameters, see `sharded.trained`."""
        return [trained(tensor.values) for tensor in self.tensors]

    def view(self, tensor: MaskedTensor, view: View) -> Tensor:
        """A view of a masked tensor as it lies in the storage."""
        return view.of(self.storage[tensor.entries])

    def parts(self) -> Iterator[Part]:
        """What the group is made of, to build other groups from."""
        for tensor in self.tensors:
            positions = self.index[tensor.selected] - tensor.entries.start
            yield Part(
                tensor, self.storage[tensor.entries], positions, self.agreed[tensor.selected]
            )

    def agree_on_training(self) -> None:
        """Have values and leaves agree on whether they require gradients.

        PEFT and its users freeze values, as parameters of a module, or leaves, under the names
        of the tensors: whichever was changed last wins.
        """
        for tensor in self.tensors:
            values = tensor.look_up_values()
            flag = tensor.is_trained
            if values.requires_grad is flag and all(
                [view.leaf.requires_grad is flag for view in tensor.views]
            ):
                continue
            tensor.is_trained = not tensor.is_trained
            values.requires_grad_(tensor.is_trained)
            for view in tensor.views:
                view.leaf.requires_grad_(tensor.is_trained)

    def install_differentiable(self) -> list[View]:
        """Give the places views whose gradients reach the values; return the views changed."""
        tensors = [tensor for tensor in self.tensors if tensor.values.requires_grad]
        if not tensors:
            return []
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "torch.func's transforms (grad, vjp, vmap, ...) cannot differentiate a masked "
                "model: use loss.backward() or torch.autograd.grad, or call remove_mask(model)"
            )
        values = [trained(tensor.values) for tensor in tensors]
        outputs = _HandOut.apply(self, tensors, *values)  # type: ignore[no-untyped-call]
        # Autograd runs the node that was made last first. Made early, this one would run when the
        # backward pass is over, and all dense gradients would wait for it.
        node: Any = None if torch.compiler.is_compiling() else outputs[0].grad_fn
        if hasattr(node, "_set_sequence_nr"):
            node._set_sequence_nr(2**63)
        views = [view for tensor in tensors for view in tensor.views]
        for view, output in zip(views, outputs, strict=True):
            view.install(output)
            if not torch.compiler.is_compiling():
                # Ctrl-C may leave it there, and torch copies leaves only.
                output.__deepcopy__ = view.leaf.__deepcopy__
        return views

    def install_constants(self) -> list[View]:
        """Have places hold tensors that require no gradients; return their views.

        torch.jit keeps them as constants of what it traces.
        """
        views = [view for tensor in self.tensors for view in tensor.views]
        for view in views:
            view.install(view.leaf.detach())
        return views

    def selected_gradients(
        self, tensors: list[MaskedTensor], gradients: Iterable[Tensor | None]
    ) -> list[Tensor | None]:
        """The gradients of the tensors' values from those of their views."""
        by_view = iter(gradients)
        flat: dict[MaskedTensor, Tensor] = {}
        for tensor in tensors:
            for view in tensor.views:
                if (gradient := next(by_view)) is not None:
                    part = view.flatten(gradient)
                    flat[tensor] = flat[tensor] + part if tensor in flat else part
        if not flat:
            return [None] * len(tensors)
        parts = [flat[t] if t in flat else self.storage.new_zeros(t.numel) for t in self.tensors]
        dense = parts[0] if len(parts) == 1 else torch.cat(parts)
        selected = dense.index_select(0, self.index).split([t.num_selected for t in self.tensors])
        by_tensor = dict(zip(self.tensors, selected, strict=True))
        return [by_tensor[t].view(t.values_shape) if t in flat else None for t in tensors]


class _HandOut(torch.autograd.Function):
    """Values -> the views of their tensors, which hold the values already; gradients back."""

    @staticmethod
    def forward(
        ctx: Any, group: Group, tensors: list[MaskedTensor], *values: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.group, ctx.tensors, ctx.values = group, tensors, values
        return tuple(view.leaf.detach() for tensor in tensors for view in tensor.views)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        selected = ctx.group.selected_gradients(ctx.tensors, gradients)
        return None, None, *averaged_gradients(ctx.values, selected)


def grouped(parts: Iterable[Part]) -> list[Group]:
    """Groups of neighbours of one device and type, up to GROUP_ENTRIES or one tensor each."""
    return [Group(group) for group in neighbours(parts, lambda part: part.flat)]


def neighbours(items: Iterable[T], memory: Callable[[T], Tensor]) -> list[list[T]]:
    """What shares a group, given the memory of each item."""
    done: list[list[T]] = []
    growing: dict[Any, list[T]] = {}
    for item in items:
        key = memory(item).device, memory(item).dtype
        group = growing.setdefault(key, [])
        if group and sum(memory(each).numel() for each in [*group, item]) > GROUP_ENTRIES:
            done.append(group)
            group = growing[key] = []
        group.append(item)
    return [*done, *growing.values()]
