"""Masked tensors: the places in a model that hold them, and the parameters with their values."""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fish_tuning.distributed import world
from fish_tuning.masked_tensors.sharded import is_sharded, trained

if TYPE_CHECKING:
    from fish_tuning.masked_tensors.storage import Group


@dataclass(eq=False)
class Place:
    """A module's attribute that holds a masked tensor.

    If some entries are selected, their values are the module's parameter of that name, and the
    tensor lies in the module's `__dict__`, where Python looks first: `module.weight` is the tensor
    and `named_parameters` lists the values. If none is, the tensor is a buffer.
    """

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
        """Have all places hold a tensor, beside its values."""
        for place in self.places:
            vars(place.module)[place.attribute] = tensor


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
        self._owner, self._attribute = place.module, place.attribute
        self._values: nn.Parameter | None = None
        """What `values` was when it was last looked up."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "group": None}

    @property
    def places(self) -> Iterator[Place]:
        """All places of all views."""
        return (place for _, place in self.views_and_places())

    def views_and_places(self) -> Iterator[tuple[View, Place]]:
        """All places, each with its view."""
        return ((view, place) for view in self.views for place in view.places)

    @property
    def name(self) -> str:
        """The name under which the model lists it first."""
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
        """The parameter that holds the selected entries, which others may have replaced.

        Where they have put a whole tensor in its place, it is the one that was there before.
        """
        held = self._owner._parameters.get(self._attribute)
        if held is None or held is self._values or held.numel() == self.numel:
            held = self._values
        assert held is not None
        return held

    @values.setter
    def values(self, values: nn.Parameter) -> None:
        self._values = values
        for place in self.places:
            place.module._parameters[place.attribute] = values

    def look_up_values(self) -> nn.Parameter:
        """The values, to go by from now on where something else takes their place."""
        values = self.values
        # `functional_call` puts other tensors there.
        if values is not self._values and isinstance(values, nn.Parameter):
            self._values = values
        return values

    def has_values(self, place: Place) -> bool:
        """Whether the parameter of a place can be values, and not a whole tensor."""
        own = place.module._parameters.get(place.attribute)
        return own is not None and own.numel() != self.numel

    def held(self, view: View, place: Place) -> Tensor | None:
        """The tensor in a place of a view, which others may have replaced; None if it is gone."""
        own = place.module._parameters.get(place.attribute)
        if own is None:
            return place.module._buffers.get(place.attribute)
        if own.numel() == self.numel:
            return own
        tensor: Tensor = vars(place.module).get(place.attribute, own)
        # Sharding lets values take the tensor's place for a while.
        return view.leaf if tensor.numel() == self.num_selected else tensor

    @property
    def is_tied(self) -> bool:
        """Whether several places hold it."""
        return len(self.views) > 1 or len(self.views[0].places) > 1

    def has_one_parameter(self) -> bool:
        """Whether all its places have the same parameter for its values."""
        return all(
            place.module._parameters.get(place.attribute) is self.values for place in self.places
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
        values = trained(self.values)
        if gradient is None or self.group is None or not values.requires_grad:
            return
        if world()[1] > 1 or is_sharded(values):
            raise RuntimeError(
                f"a gradient reached {self.name} outside of a forward pass of the masked model, "
                "where no engine averages it over the processes: call the model that was masked, "
                "and checkpoint with use_reentrant=False"
            )
        self.group.was_bypassed = True
        positions = self.group.index[self.selected].long() - self.entries.start
        selected = view.flatten(gradient)[positions].view(self.values_shape).to(values)
        values.grad = selected if values.grad is None else values.grad + selected

    @cached_property
    def checksum(self) -> int:
        """CRC-32 of which entries are selected, which never changes."""
        return zlib.crc32(self.bits().numpy().data)


def tensor_named(model: nn.Module, name: str) -> Tensor:
    """A model's whole tensor; under a mask, the parameter of that name is the values alone."""
    module, _, attribute = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(module), attribute)
    return tensor


def as_leaf(tensor: Tensor, requires_grad: bool) -> Tensor:
    """A tensor without history, which code that expects a parameter takes for one.

    It shares the memory of others in its group, which copies of a true `nn.Parameter` would not.
    """
    leaf = tensor.detach().requires_grad_(requires_grad)
    vars(leaf)["_is_param"] = True  # What isinstance(leaf, nn.Parameter) goes by.
    return leaf


def _receiver(tensor: MaskedTensor, view: View) -> Callable[[Tensor], None]:
    """A hook that keeps nothing alive: garbage collection does not look into tensors' hooks."""
    to_tensor, to_view = weakref.ref(tensor), weakref.ref(view)

    def hook(leaf: Tensor) -> None:
        tensor, view = to_tensor(), to_view()
        if tensor is not None and view is not None:
            tensor.receive(view, leaf)

    return hook


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
