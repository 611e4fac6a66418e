"""Turns parameters into masked tensors and back, in the modules that own them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fish_tuning.masked_tensors.reconcile import check_tied, current_tensor
from fish_tuning.masked_tensors.storage import Part
from fish_tuning.masked_tensors.tensors import (
    MaskedTensor,
    Place,
    View,
    contiguous_stride,
    fills_its_memory,
)

Orders = dict[nn.Module, list[str]]
"""The order in which modules held their parameters before they were masked."""

UNSELECTED = "fish_unselected"
"""Module attribute that holds an unselected tensor. Transformers finds the device and type of a
module without parameters by such attributes."""


def find_tensors(
    model: nn.Module, mask: Mapping[str, Tensor], provenance: dict[str, Any]
) -> list[tuple[MaskedTensor, Tensor]]:
    """The tensors that a mask names, each with its selected entries in the order of its memory.

    Parameters are tied if they share their memory, as one object or as views. Tied names make up
    one tensor, whose selected entries are those that the mask selects under any of them.
    """
    parameters = dict(model.named_parameters())
    wanted: dict[Any, list[str]] = {}
    for name in mask:
        wanted.setdefault(_memory(parameters[name]), []).append(name)
    views: dict[Any, dict[Any, View]] = {memory: {} for memory in wanted}
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is None or (memory := _memory(parameter)) not in views:
                continue
            name = f"{path}.{attribute}" if path else attribute
            shape, stride = parameter.shape, parameter.stride()
            if not fills_its_memory(parameter):
                stride = contiguous_stride(shape)
            view = views[memory].setdefault(
                (shape, stride), View(shape, stride, [], parameter.detach())
            )
            view.places.append(Place(module, attribute, name, name in mask))
    found = []
    for memory, names in wanted.items():
        tied = list(views[memory].values())
        bits = torch.stack(
            [
                view.flatten(mask[place.name].to(view.leaf.device))
                for view in tied
                for place in view.places
                if place.in_mask
            ]
        ).any(0)
        trainable = any(parameters[name].requires_grad for name in names)
        tensor = MaskedTensor(tied, bits.numel(), int(bits.sum()), trainable, provenance)
        found.append((tensor, bits))
    return found


def _memory(parameter: Tensor) -> Any:
    """What parameters have in common that share their memory."""
    if parameter.is_meta or not parameter.numel() or not fills_its_memory(parameter):
        return id(parameter)
    address = parameter.untyped_storage().data_ptr()
    return parameter.device, address, parameter.storage_offset(), parameter.numel()


def split_parameter(tensor: MaskedTensor, bits: Tensor, orders: Orders) -> Part:
    """Replace a parameter by its values; return what its group is built from."""
    view = tensor.views[0]
    held = view.leaf
    # In place where possible: a group of a single tensor then needs no copy of it.
    flat = (
        held.as_strided((held.numel(),), (1,), held.storage_offset())
        if held.stride() == view.stride
        else held.reshape(-1)
    )
    positions = bits.nonzero().squeeze(1)
    agreed = flat[positions]
    for place in tensor.places:
        orders.setdefault(place.module, list(place.module._parameters))
    tensor.values = nn.Parameter(agreed.clone().view(tensor.values_shape), tensor.was_trainable)
    return Part(tensor, flat, positions, agreed)


def freeze_parameter(tensor: MaskedTensor, orders: Orders) -> None:
    """Replace a parameter of which nothing is selected by a buffer."""
    for place in tensor.places:
        orders.setdefault(place.module, list(place.module._parameters))
        del place.module._parameters[place.attribute]
    for view in tensor.views:
        hold_unselected(view, view.leaf)


def hold_unselected(view: View, tensor: Tensor) -> None:
    """Have every place of an unselected tensor hold this one, as a buffer."""
    view.leaf = tensor.detach()
    for place in view.places:
        place.module._parameters.pop(place.attribute, None)
        place.module._buffers[place.attribute] = view.leaf
        vars(place.module)[UNSELECTED] = view.leaf


def take_in_unselected(tensors: Iterable[MaskedTensor]) -> None:
    """Take in unselected tensors that were moved, cast or replaced.

    Raises:
        RuntimeError: One is gone, has another shape than its mask, or was tied to another.
    """
    for tensor in tensors:
        for view in tensor.views:
            held = [place.module._buffers.get(place.attribute) for place in view.places]
            if any(each is not view.leaf for each in held) or view.leaf.requires_grad:
                check_tied(tensor)
                hold_unselected(view, current_tensor(tensor, view, view.places[0]))


def cast_unselected(tensors: Iterable[MaskedTensor], before: torch.dtype, now: torch.dtype) -> None:
    """Cast the tensors that would have been cast with the values, were they parameters."""
    for view in (view for tensor in tensors for view in tensor.views):
        if view.leaf.dtype == before:
            hold_unselected(view, view.leaf.to(now))


def restore_parameter(
    tensor: MaskedTensor, memory: Tensor, requires_grad: bool, orders: Orders
) -> None:
    """Make a tensor the parameter again that it was before it was masked.

    Args:
        tensor: The tensor. Places from which it was deleted stay without it; those that hold a
            tensor of another shape, or were untied, keep that.
        memory: Its entries in the order of its memory, which the parameter takes over.
        requires_grad: Whether it is trainable.
        orders: The order of the parameters in their modules.
    """
    for view in tensor.views:
        parameter = nn.Parameter(view.of(memory), requires_grad)
        for place in view.places:
            module, attribute = place.module, place.attribute
            held = tensor.held(view, place)
            untied = held is module._parameters.get(attribute) and tensor.is_tied
            for attributes in (vars(module), module._buffers):
                attributes.pop(attribute, None)
            vars(module).pop(UNSELECTED, None)
            if held is None:
                continue
            fits = held.shape == view.shape and not untied
            module._parameters[attribute] = (
                parameter if fits else nn.Parameter(held.detach(), requires_grad)
            )
            sort(module._parameters, orders.get(module, []))


@contextmanager
def as_buffers(places: Iterable[Place], with_values: bool) -> Iterator[None]:
    """Have modules hold masked tensors as buffers for a while: PyTorch moves and loads those.

    Args:
        places: Where the tensors are.
        with_values: Whether the values stay parameters, under the same names.
    """
    held = [(place.module, place.attribute) for place in places]
    orders = {module: list(module._parameters) for module, _ in held}
    values = {each: each[0]._parameters[each[1]] for each in held}
    for module, attribute in held:
        module._buffers[attribute] = vars(module)[attribute]
        if not with_values:
            del vars(module)[attribute], module._parameters[attribute]
    try:
        yield
    finally:
        for module, attribute in held:
            tensor = module._buffers.pop(attribute, None)
            if tensor is None:  # Loading has assigned a parameter.
                tensor = getattr(module, attribute).detach()
                del module._parameters[attribute]
            vars(module)[attribute] = tensor
            module._parameters.setdefault(attribute, values[module, attribute])
            sort(module._parameters, orders[module])


def sort(parameters: dict[str, Any], order: Iterable[str]) -> None:
    """Put a module's parameters in an order, and others after them."""
    before = dict(parameters)
    names = [name for name in order if name in before]
    parameters.clear()
    parameters.update({name: before.pop(name) for name in names} | before)
