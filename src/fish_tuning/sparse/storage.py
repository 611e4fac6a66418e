"""Masked tensors in flat storage, with one autograd node for each group of them.

The tensors of a group lie one after the other in a flat ``storage``, which is no parameter. The
selected entries of each tensor are a parameter of their own, its ``values``, in the module that
owns the tensor. The node of a forward pass hands out the tensors as views of the storage; its
backward gathers their gradients at ``index``, the places of the selected entries.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fish_tuning.sparse.sharded import averaged_gradients, is_sharded

GROUP_ENTRIES = 2**22
"""Small tensors share a node up to this size. A node waits for the gradients of all its tensors,
so a larger group would keep many dense gradients alive at once."""


def values_name(attribute: str) -> str:
    """Name of the parameter that holds the selected entries of a module's tensor."""
    return f"{attribute}_values"


@dataclass(eq=False)
class Place:
    """A module's attribute that holds a masked tensor."""

    module: nn.Module
    attribute: str
    name: str
    """Its name in the model, such as `layer.0.lora_A.default.weight`."""
    in_mask: bool
    """Whether the mask names it. Of a tensor with several names, it may name only some."""


@dataclass(eq=False)
class View:
    """One shape of a masked tensor, and the places that hold it.

    Most tensors have one view. PEFT ties adapters by views of the same memory, one transposed.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    places: list[Place]
    leaf: Tensor
    """What the places hold, except during a forward pass with gradients."""
    saved: weakref.ref[Tensor] | None = None
    """The latest tensor made of it for a state dict, and its key there."""
    saved_key: str = ""

    def __post_init__(self) -> None:
        self.is_contiguous = self.stride == contiguous_stride(self.shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "saved": None}

    def of(self, flat: Tensor) -> Tensor:
        """The view of a tensor's memory."""
        return (
            flat.view(self.shape)
            if self.is_contiguous
            else flat.as_strided(self.shape, self.stride, flat.storage_offset())
        )

    def flatten(self, tensor: Tensor) -> Tensor:
        """The entries of a tensor of this shape, in the order of the view's memory."""
        if self.is_contiguous:
            return tensor.reshape(-1)
        flat = tensor.new_empty(tensor.numel())
        self.of(flat).copy_(tensor)
        return flat

    def install(self, tensor: Tensor) -> None:
        for place in self.places:
            place.module._buffers[place.attribute] = tensor


@dataclass(eq=False)
class MaskedTensor:
    """A tensor that a mask names: where the model holds it, and its part of a group."""

    views: list[View]
    numel: int
    num_selected: int
    was_trainable: bool
    """Whether it required gradients when it was last an ordinary parameter."""
    provenance: dict[str, Any]
    """How its mask was made."""
    is_trained: bool = False
    """Whether values and leaves required gradients when they last agreed on it."""
    group: Group | None = None
    entries: slice = field(default_factory=lambda: slice(0))
    """Its part of the group's storage."""
    selected: slice = field(default_factory=lambda: slice(0))
    """Its part of the group's index."""

    def __post_init__(self) -> None:
        place = self.views[0].places[0]
        self._owner, self._values_name = place.module, values_name(place.attribute)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "group": None}

    @property
    def places(self) -> Iterator[Place]:
        return (place for view in self.views for place in view.places)

    @property
    def name(self) -> str:
        return self.views[0].places[0].name

    @property
    def is_split(self) -> bool:
        """Whether some of its entries are selected, and some are not."""
        return 0 < self.num_selected < self.numel

    @property
    def is_frozen(self) -> bool:
        """Whether none of its entries is selected. An empty tensor stays a parameter."""
        return not self.num_selected and self.numel > 0

    @property
    def values(self) -> nn.Parameter:
        """The parameter that holds the selected entries, which others may have replaced."""
        values = self._owner._parameters[self._values_name]
        assert values is not None
        return values

    @property
    def is_tied(self) -> bool:
        """Whether several places hold it."""
        return len(self.views) > 1 or len(self.views[0].places) > 1

    def has_one_parameter(self) -> bool:
        """Whether all its places have the same parameter for its values."""
        return all(
            place.module._parameters.get(values_name(place.attribute)) is self.values
            for place in self.places
        )

    @property
    def values_shape(self) -> tuple[int, ...]:
        """(k, 1) for matrices, (k,) for vectors: optimizers treat vectors as biases or norms."""
        vector = len(self.views[0].shape) < 2
        return (self.num_selected,) if vector else (self.num_selected, 1)

    def bits(self) -> Tensor:
        """Which entries are selected, in the order of the tensor's memory."""
        if self.group is None:
            return torch.full((self.numel,), self.num_selected > 0)
        bits = torch.zeros(self.numel, dtype=torch.bool)
        bits[self.group.index[self.selected].long().cpu() - self.entries.start] = True
        return bits

    def receive_from(self, view: View, leaf: Tensor) -> None:
        """Have the gradients of a leaf that places of a view hold passed on to the values."""
        requires_grad = leaf.requires_grad
        # Hooks need a leaf that requires gradients, now or later.
        leaf.requires_grad_().register_post_accumulate_grad_hook(_receiver(self, view))
        leaf.requires_grad_(requires_grad)

    def receive(self, view: View, leaf: Tensor) -> None:
        """Pass a gradient that reached a leaf on to the values.

        It did not pass through the group's node: a part of the model was called by itself, or
        checkpointing with reentrance ran a layer a second time, in the backward pass.
        """
        gradient, leaf.grad = leaf.grad, None
        values = self.values
        if gradient is None or self.group is None or not values.requires_grad:
            return
        if is_sharded(values):
            raise RuntimeError(
                f"a gradient reached {self.name} outside of a forward pass of the masked model, "
                "which fully_shard does not allow: call the model that was masked, and checkpoint "
                "with use_reentrant=False"
            )
        positions = self.group.index[self.selected].long() - self.entries.start
        selected = view.flatten(gradient)[positions].view(self.values_shape).to(values)
        values.grad = selected if values.grad is None else values.grad + selected

    @cached_property
    def checksum(self) -> int:
        """CRC-32 of which entries are selected, which never changes."""
        return zlib.crc32(self.bits().numpy().data)


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
        """The storage's, when the last forward pass began."""
        self.only_values_cast = False
        """Whether it no longer holds since somebody has cast values, but not their tensors."""
        self.has_conflict = torch.zeros((), dtype=torch.bool, device=self.storage.device)
        for tensor in self.tensors:
            tensor.is_trained = tensor.values.requires_grad
            for view in tensor.views:
                view.leaf = self.view(tensor, view).detach().requires_grad_(tensor.is_trained)
                view.install(view.leaf)
        self.attach()

    def attach(self) -> None:
        """Refer tensors and their leaves to the group, as copies and pickles do not."""
        self._held = [
            (place.module, place.attribute, view.leaf, tensor.entries.start)
            for tensor in self.tensors
            for view in tensor.views
            for place in view.places
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
        return (
            all(
                module._buffers.get(attribute) is leaf
                and leaf.data_ptr() == address + start * itemsize
                for module, attribute, leaf, start in self._held
            )
            and all(v.dtype == dtype and v.device == device for v in self.values())
            and all(tensor.has_one_parameter() for tensor in self._tied)
        )

    def values(self) -> list[nn.Parameter]:
        """The parameters of its tensors."""
        return [tensor.values for tensor in self.tensors]

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
            values = tensor.values
            flags = [values.requires_grad, *(view.leaf.requires_grad for view in tensor.views)]
            if all(flag == tensor.is_trained for flag in flags):
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
        values = [tensor.values for tensor in tensors]
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
        selected = dense.index_select(0, self.index)
        return [
            selected[tensor.selected].view(tensor.values_shape) if tensor in flat else None
            for tensor in tensors
        ]


def _receiver(tensor: MaskedTensor, view: View) -> Callable[[Tensor], None]:
    """A hook that keeps nothing alive: garbage collection does not look into tensors' hooks."""
    to_tensor, to_view = weakref.ref(tensor), weakref.ref(view)

    def hook(leaf: Tensor) -> None:
        tensor, view = to_tensor(), to_view()
        if tensor is not None and view is not None:
            tensor.receive(view, leaf)

    return hook


class _HandOut(torch.autograd.Function):
    """Values -> the views of their tensors, which hold the values already; gradients back."""

    @staticmethod
    def forward(
        ctx: Any, group: Group, tensors: list[MaskedTensor], *values: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        # As they are now: fully_shard has modules hold other parameters in the backward pass.
        ctx.group, ctx.tensors, ctx.values = group, tensors, values
        return tuple(view.leaf.detach() for tensor in tensors for view in tensor.views)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        selected = ctx.group.selected_gradients(ctx.tensors, gradients)
        return None, None, *averaged_gradients(ctx.values, selected)


def grouped(parts: Iterable[Part]) -> list[Group]:
    """Groups of neighbours of one device and type, up to GROUP_ENTRIES or one tensor each."""
    done: list[list[Part]] = []
    growing: dict[Any, list[Part]] = {}
    for part in parts:
        key = part.flat.device, part.flat.dtype
        group = growing.setdefault(key, [])
        if group and sum(p.flat.numel() for p in [*group, part]) > GROUP_ENTRIES:
            done.append(group)
            group = growing[key] = []
        group.append(part)
    return [Group(parts) for parts in [*done, *growing.values()]]


def contiguous_stride(shape: Iterable[int]) -> tuple[int, ...]:
    """Strides of a tensor of this shape without gaps, in the usual order."""
    stride, strides = 1, []
    for size in reversed(tuple(shape)):
        strides.append(stride)
        stride *= max(size, 1)
    return tuple(reversed(strides))


def fills_its_memory(tensor: Tensor) -> bool:
    """Whether a tensor's entries lie side by side in memory, each once, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
