"""State dicts of masked modules are those of the plain model: tensors, and no values."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack, to_dlpack

from fish_tuning.masked_tensors.parameters import as_buffers
from fish_tuning.masked_tensors.reconcile import check_conflicts
from fish_tuning.masked_tensors.tensors import MaskedTensor, Place, View
from fish_tuning.sparse.state import MaskState

logger = logging.getLogger(__name__)

_METADATA = "fish_mask"
"""Key of a module's metadata in a state dict: a checksum of the selected entries by attribute."""

_FEW = 2 / 3
"""Share of its frozen entries that a state dict of another mask changes at most."""


def hook_state_dict(state: MaskState, module: nn.Module) -> None:
    """Hook the saving and loading of a module that owns masked tensors."""
    before, after = functools.partial(_before_save, state), functools.partial(_after_save, state)
    state.uninstallers += [
        module.register_state_dict_pre_hook(before).remove,
        module.register_state_dict_post_hook(after).remove,
    ]


def owned(state: MaskState, module: nn.Module) -> Iterator[tuple[MaskedTensor, View, Place]]:
    """The masked tensors that a module holds, each with its view and place there."""
    for tensor in state.by_module.get(module, []):
        for view, place in tensor.views_and_places():
            if place.module is module:
                yield tensor, view, place


def _before_save(state: MaskState, module: nn.Module, prefix: str, keep_vars: bool) -> None:
    state.update(module)
    check_conflicts(t.group for t in state.by_module.get(module, []) if t.group is not None)


def _after_save(
    state: MaskState, module: nn.Module, saved: dict[str, Any], prefix: str, metadata: Any
) -> None:
    checksums = {}
    for tensor, view, place in owned(state, module):
        key = prefix + place.attribute
        if tensor.is_split and key in saved:
            # With keep_vars, a state dict holds what the module holds.
            keep_vars = saved[key] is module._parameters[place.attribute]
            saved[key] = view.leaf if keep_vars else _unshared(tensor, view, saved, key)
        if view.is_contiguous:
            checksums[place.attribute] = tensor.checksum
    metadata[_METADATA] = checksums


def _unshared(tensor: MaskedTensor, view: View, saved: Mapping[str, Any], key: str) -> Tensor:
    """A tensor for a state dict, one for all of its names, which shares the model's memory.

    Writing into a state dict writes the model, as without a mask. But views of one storage look
    like tied weights to those that save them: each tensor gets a storage of its own.
    """
    earlier: Tensor | None = None if view.saved is None else view.saved()
    is_latest = saved.get(view.saved_key) is earlier
    if earlier is not None and is_latest:
        return earlier
    alias = _alias(tensor, view)
    view.saved, view.saved_key = weakref.ref(alias), key
    return alias


def _alias(tensor: MaskedTensor, view: View) -> Tensor:
    """A tensor in the memory of a view, with a storage that holds nothing else."""
    leaf: Tensor = view.leaf.detach()
    if type(leaf) is not Tensor or leaf.device.type not in ("cpu", "cuda"):
        return leaf.clone()
    assert tensor.group is not None
    flat = tensor.group.storage.detach()[tensor.entries]
    # As bytes: the exchange format does not know every type.
    return view.of(from_dlpack(to_dlpack(flat.view(torch.uint8))).view(flat.dtype))


def with_tensors(state: MaskState, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict of parameters, with the model's tensors in place of their values.

    Scripts choose what save_pretrained is to write from the model's named_parameters. These list
    values, and leave out tensors of which nothing is selected, which are added here.
    """
    places = [(t, view, place) for t in state.tensors for view, place in t.views_and_places()]
    whole = {
        place.name: _filled(tensor, view, given[place.name])
        for tensor, view, place in places
        if place.name in given and _are_values(tensor, given[place.name])
    }
    if not whole:
        return given
    unselected = {p.name: view.leaf.detach() for t, view, p in places if t.is_frozen}
    return {**unselected, **given, **whole}


def _are_values(tensor: MaskedTensor, given: Any) -> bool:
    """Whether what is given under a tensor's name are its values, and not the whole tensor."""
    return tensor.is_split and getattr(given, "shape", None) == tensor.values_shape


def _filled(tensor: MaskedTensor, view: View, values: Tensor) -> Tensor:
    """A copy of a masked tensor with these values, on their device."""
    group = tensor.group
    assert group is not None
    flat = group.storage.detach()[tensor.entries].clone()
    positions = group.index[tensor.selected].long() - tensor.entries.start
    flat[positions] = values.detach().reshape(-1).to(flat)
    return view.of(flat).to(values)


def load_tensors(
    state: MaskState,
    module: nn.Module,
    load: Callable[..., None],
    loaded: Mapping[str, Any],
    prefix: str,
    metadata: Any,
    *args: Any,
) -> None:
    """Load a module's tensors from a state dict, or its values if that is what it holds.

    `load` is the module's own `_load_from_state_dict`, with its arguments after it.

    Raises:
        ValueError: The state dict was saved under another mask.
    """
    # Values written before are older than what is loaded.
    state.update(module)
    _check_loaded(state, module, loaded, prefix, metadata.get(_METADATA, {}))
    places = [
        place
        for tensor, _, place in owned(state, module)
        if tensor.is_split and not _are_values(tensor, loaded.get(prefix + place.attribute))
    ]
    with as_buffers(places, with_values=False):
        load(loaded, prefix, metadata, *args)
    state.update(module)


def _check_loaded(
    state: MaskState,
    module: nn.Module,
    loaded: Mapping[str, Any],
    prefix: str,
    checksums: Mapping[str, int],
) -> None:
    for tensor, view, place in owned(state, module):
        checksum = checksums.get(place.attribute)
        if (new := loaded.get(prefix + place.attribute)) is None or checksum == tensor.checksum:
            continue
        if checksum is not None:
            raise ValueError(
                "the state dict was saved under another mask: it selects other entries of "
                f"{place.name}. Apply the mask that was saved with it (FishMask.from_pretrained), "
                "or call remove_mask(model) before you load it"
            )
        if not state.has_warned_of_load:
            _warn_of_other_mask(state, place.name, *_changed_frozen(tensor, view, new))


def _warn_of_other_mask(state: MaskState, name: str, changed: int, frozen: int) -> None:
    """Warn, once for each model, if a state dict changes frozen entries of a tensor in part.

    Files in safetensors format say nothing of masks. But training under another mask changes some
    of these entries and leaves the others, while the same mask leaves all, and dense training or
    another start changes nearly all. It is no proof: sparse updates that were merged look the same.
    """
    if 0 < changed <= _FEW * frozen:
        state.has_warned_of_load = True
        logger.warning(
            "The state dict changes %s of the %s entries of %s that the mask freezes, and leaves "
            "the others: it may have been trained under another mask. If so, apply the mask that "
            "was saved with it (FishMask.from_pretrained), or training goes on with other entries",
            f"{changed:,}",
            f"{frozen:,}",
            name,
        )


def _changed_frozen(tensor: MaskedTensor, view: View, loaded: Any) -> tuple[int, int]:
    """How many frozen entries a loaded tensor would change, and of how many.

    Rounding is no change: files in half precision and averages have some. Numbers that were pruned
    to zero do not count, nor do rows and columns of zeros, which adapters that were converted to
    LoRA have.
    """
    held = view.leaf.detach()
    if type(loaded) not in (Tensor, nn.Parameter) or loaded.is_meta or loaded.shape != view.shape:
        return 0, 0
    if not loaded.is_floating_point():
        return 0, 0
    rounding = 2 * max(torch.finfo(each.dtype).eps for each in (held, loaded))
    wide = torch.float64 if held.dtype == torch.float64 else torch.float32
    held, loaded = held.to(wide), loaded.detach().to(held.device, wide)
    counted = ~view.of(tensor.bits()).to(held.device) & ((loaded != 0) | (held == 0))
    if loaded.dim() > 1:
        nonzero = (loaded != 0).flatten(1)
        used = nonzero.any(0, keepdim=True) & nonzero.any(1, keepdim=True)
        counted &= used.view(loaded.shape)
    equal = torch.isclose(loaded, held, rtol=rounding, atol=0, equal_nan=True)
    return int((~equal & counted).sum()), int(counted.sum())
