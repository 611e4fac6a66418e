"""Keeps the two copies of every selected entry equal: its value, and its place in the tensor.

An optimizer writes the values. Whoever knows nothing of masks (``copy_``, ``nn.init``, a loaded
state dict, ``.data``) writes the tensor. A group keeps the numbers on which both last agreed, so
that each entry shows which of its copies was written since: that one wins. No version counters
are needed, and no write escapes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from fish_tuning.masked_tensors.sharded import assign, gathered, trained
from fish_tuning.masked_tensors.storage import Group, Part, grouped
from fish_tuning.masked_tensors.tensors import MaskedTensor, Place, View

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def reconcile(group: Group, tensor: MaskedTensor | None = None) -> None:
    """Bring values and storage to the same numbers: each entry takes the copy written last.

    It writes through `.data`: further forward passes and state dicts may come before a backward
    pass, and writing numbers that are there already must not invalidate what it needs.

    Args:
        group: The group.
        tensor: The only tensor of the group to look at, or None for all of them.

    Raises:
        RuntimeError: Both copies of an entry were written, with different numbers. Accelerators
            would have to wait for the answer here: `check_conflicts` asks them later.
    """
    tensors = group.tensors if tensor is None else [tensor]
    part = slice(None) if tensor is None else tensor.selected
    # Indexing takes int64 alone; converting and copying is faster than every other way.
    index, agreed = group.index[part].long(), group.agreed[part]
    sizes = [each.num_selected for each in tensors]
    values = gathered([each.values for each in tensors], sizes, agreed)
    stored = group.storage.data.index_select(0, index)
    value_written = _bits(values) != _bits(agreed)
    stored_written = _bits(stored) != _bits(agreed)
    conflict = value_written & stored_written & (_bits(stored) != _bits(values))
    write_values = True
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        write_values = bool(stored_written.any())
        if not (write_values or value_written.any()):
            return
        if write_values and conflict.any():
            raise _conflict_error(tensors, conflict)
    else:
        group.has_conflict.logical_or_(conflict.any())
    merged = torch.where(value_written, values, stored)
    group.storage.data.index_copy_(0, index, merged)
    agreed.copy_(merged)
    if write_values:
        for each, new in zip(tensors, merged.split(sizes), strict=True):
            assign(each.values, new)


def check_conflicts(groups: Iterable[Group]) -> None:
    """Raise RuntimeError if an accelerator has found an entry of which both copies were written."""
    for group in groups:
        if group.has_conflict:
            group.has_conflict.zero_()
            raise _conflict_error(group.tensors, None)


def _conflict_error(tensors: list[MaskedTensor], conflict: Tensor | None) -> RuntimeError:
    names = [tensor.name for tensor in tensors]
    if conflict is not None:
        parts = conflict.split([tensor.num_selected for tensor in tensors])
        names = [tensor.name for tensor, part in zip(tensors, parts, strict=True) if part.any()]
    return RuntimeError(
        f"{names[0]} and its trained values, the parameter of that name, were both written since "
        "they last agreed, with different numbers: undo one of the two, or call the model in "
        "between"
    )


def _bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers, so that NaN equals itself."""
    return tensor.view(_INTEGERS[tensor.itemsize])


def take_in_replaced(
    tensors: Iterable[MaskedTensor], apart_from: Iterable[MaskedTensor] = ()
) -> dict[Group, list[Group]]:
    """Take in split tensors that were moved, cast or replaced.

    Casting a module, assigning a parameter or swapping a tensor's `.data` leaves a module with a
    tensor outside the group's storage.

    Args:
        tensors: The tensors.
        apart_from: Tensors with which they must not share memory.

    Returns:
        Groups that no longer hold, with those that take their place.

    Raises:
        RuntimeError: A tensor is gone, has another shape than its mask, or was tied to another.
    """
    replaced: dict[MaskedTensor, tuple[View, Tensor]] = {}
    changed: dict[Group, None] = {}
    for tensor in tensors:
        group, values = tensor.group, _tied_values(tensor)
        assert group is not None
        storage, found = group.storage, _outside(tensor, group.storage)
        _check_in_memory(tensor, values if found is None else found[1])
        if found is not None:
            check_tied(tensor)
            replaced[tensor] = found
            _undo_whole(values, tensor)
            if found[1].dtype != storage.dtype or found[1].device != storage.device:
                changed[group] = None
        if trained(values).dtype != storage.dtype or values.device != storage.device:
            changed[group] = None
    if replaced:
        _check_apart(apart_from)
    for tensor, (view, held) in replaced.items():
        if tensor.group is None or tensor.group in changed:
            continue
        tensor.group.storage.data[tensor.entries] = view.flatten(held)
        for each in tensor.views:
            each.leaf.data = tensor.group.view(tensor, each).detach()
            _hold_leaf(tensor, each)
    return {group: grouped(_moved_parts(group, replaced)) for group in changed}


def _check_in_memory(tensor: MaskedTensor, held: Tensor) -> None:
    assert tensor.group is not None
    if held.is_meta and not tensor.group.storage.is_meta:
        raise RuntimeError(
            f"{tensor.name} was moved to the meta device: trained values cannot be offloaded "
            "(cpu_offload, disk_offload or dispatch_model of accelerate). Call remove_mask(model) "
            "before you offload the model"
        )


def _undo_whole(values: nn.Parameter, tensor: MaskedTensor) -> None:
    """Give values their size again where a whole tensor was put into their `.data`."""
    if values.numel() == tensor.numel and tensor.group is not None:
        agreed = tensor.group.agreed[tensor.selected]
        values.data = agreed.view(tensor.values_shape).clone()


def _outside(tensor: MaskedTensor, storage: Tensor) -> tuple[View, Tensor] | None:
    """A tensor that some place holds in place of its view of the storage, if there is one."""
    address = storage.data_ptr() + tensor.entries.start * storage.itemsize
    for view in tensor.views:
        for place in view.places:
            held = vars(place.module).get(place.attribute)
            if held is not view.leaf or held.data_ptr() != address or not tensor.has_values(place):
                return view, current_tensor(tensor, view, place)
    return None


def current_tensor(tensor: MaskedTensor, view: View, place: Place) -> Tensor:
    """What a module holds under a masked tensor's name; raise RuntimeError if it does not fit."""
    held = tensor.held(view, place)
    if held is None:
        raise unfit(f"{place.name} is gone from its module")
    if held.shape != view.shape:
        now, then = tuple(held.shape), tuple(view.shape)
        raise unfit(f"{place.name} is {now} now, its mask {then}")
    return held.detach()


def check_tied(tensor: MaskedTensor) -> None:
    """Check that no place of a tied tensor was given a parameter of its own.

    Casts and loading part the places too, but leave buffers: these are tied again.

    Raises:
        RuntimeError: One was.
    """
    held = {
        place.name: current_tensor(tensor, view, place) for view, place in tensor.views_and_places()
    }
    addresses = {name: each.data_ptr() for name, each in held.items()}
    for place in tensor.places:
        others = [name for name in held if addresses[name] != addresses[place.name]]
        if others and place.attribute in place.module._parameters and not tensor.has_values(place):
            raise unfit(f"{place.name} and {others[0]} were tied and are no longer")


def _check_apart(tensors: Iterable[MaskedTensor]) -> None:
    """Check that no masked tensor was assigned to another's place, which would tie the two."""
    holders: dict[tuple[torch.device, int], MaskedTensor] = {}
    for tensor in tensors:
        for view, place in tensor.views_and_places():
            held = tensor.held(view, place)
            if held is None or held.is_meta or not held.numel():
                continue
            other = holders.setdefault((held.device, held.data_ptr()), tensor)
            if other is not tensor:
                raise RuntimeError(
                    f"{place.name} and {other.name} were tied after they were masked: call "
                    "remove_mask(model), tie them, and mask the model again"
                )


def fits(tensor: MaskedTensor) -> bool:
    """Whether modules still hold a tensor in the shapes and ties of its mask."""
    try:
        check_tied(tensor)
    except RuntimeError:
        return False
    return True


def unfit(reason: str) -> RuntimeError:
    """The error of a mask that no longer fits its model."""
    return RuntimeError(
        f"the mask no longer fits the model: {reason}. Call remove_mask(model), and mask the "
        "model as it is now"
    )


def _hold_leaf(tensor: MaskedTensor, view: View) -> None:
    """Have every place hold the view's leaf beside the values, whatever it held."""
    tensor.values = tensor.values
    view.install(view.leaf)


def _tied_values(tensor: MaskedTensor) -> nn.Parameter:
    """The values of a tensor, the same in all places: casts may have parted them."""
    values = tensor.values
    for place in tensor.places if tensor.is_tied else ():
        if tensor.has_values(place):
            place.module._parameters[place.attribute] = values
    return values


@torch.no_grad()
def _moved_parts(
    group: Group, replaced: Mapping[MaskedTensor, tuple[View, Tensor]]
) -> Iterator[Part]:
    """The parts of a group after some have changed their device or type."""
    for tensor, flat, positions, agreed in group.parts():
        values = trained(tensor.values)
        if tensor in replaced:
            view, held = replaced[tensor]
            flat = view.flatten(held)
        if flat.dtype == agreed.dtype and flat.device == agreed.device:
            # PEFT and DeepSpeed cast parameters, and leave buffers as they are.
            group.only_values_cast |= values.dtype != flat.dtype
            flat = flat.to(values.device, values.dtype)
        elif values.dtype != flat.dtype or values.device != flat.device:
            _cast(values, flat)
        for view in tensor.views:
            _hold_leaf(tensor, view)
        yield Part(tensor, flat, positions.to(flat.device), agreed.to(flat))


def _cast(values: nn.Parameter, like: Tensor) -> None:
    gradient, values.grad = values.grad, None
    values.data = values.data.to(like)
    if gradient is not None:
        values.grad = gradient.to(like)
