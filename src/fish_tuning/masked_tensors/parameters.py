"""Turns parameters into masked tensors and back, in the modules that own them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fish_tuning.masked_tensors.storage import Part
from fish_tuning.masked_tensors.tensors import (
    MaskedTensor,
    Place,
    View,
    contiguous_stride,
    fills_its_memory,
    values_name,
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
    """Replace a parameter by its values and a buffer; return what its group is built from."""
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
    values = nn.Parameter(agreed.clone().view(tensor.values_shape), tensor.was_trainable)
    for place in tensor.places:
        module, attribute = place.module, place.attribute
        orders.setdefault(module, list(module._parameters))
        replaced = {
            values_name(attribute) if name == attribute else name: parameter
            for name, parameter in module._parameters.items()
        }
        module._parameters.clear()
        module._parameters.update({**replaced, values_name(attribute): values})
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
    view.install(view.leaf)
    for place in view.places:
        place.module._parameters.pop(place.attribute, None)
        vars(place.module)[UNSELECTED] = view.leaf


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
            module._parameters.pop(values_name(attribute), None)
            vars(module).pop(UNSELECTED, None)
            held = module._buffers.pop(attribute, None)
            untied = held is None and tensor.is_tied
            held = module._parameters.pop(attribute, None) if held is None else held
            if held is None:
                continue
            fits = held.shape == view.shape and not untied
            module._parameters[attribute] = (
                parameter if fits else nn.Parameter(held.detach(), requires_grad)
            )
            _sort(module._parameters, orders.get(module, []))


def _sort(parameters: dict[str, Any], order: Iterable[str]) -> None:
    """Put parameters in an order; masked ones stand where their values do."""
    before = dict(parameters)
    names = [n for name in order for n in (name, values_name(name)) if n in before]
    parameters.clear()
    parameters.update({name: before.pop(name) for name in names} | before)
