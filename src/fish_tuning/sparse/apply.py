"""Masks a model: the selected entries become its only trainable numbers. And takes masks off."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

from torch import Tensor, nn

from fish_tuning.arguments import check_mask
from fish_tuning.distributed import check_equal
from fish_tuning.engines import check_maskable, check_model
from fish_tuning.mask.mask import FishMask
from fish_tuning.masked_tensors.sharded import trained
from fish_tuning.sparse.adapter_names import belongs_to_adapter, for_active_adapter
from fish_tuning.sparse.checks import (
    check_fits,
    check_gradients_unused,
    check_unmasked,
    warn_of_others,
)
from fish_tuning.sparse.hooks import hook_forward
from fish_tuning.sparse.patches import patch_model
from fish_tuning.sparse.registry import STATE, state_of
from fish_tuning.sparse.saving import patch_saving
from fish_tuning.sparse.state import MaskState
from fish_tuning.sparse.state_dict import hook_state_dict


def apply_mask(model: nn.Module, mask: Mapping[str, Tensor]) -> nn.Module:
    """Make the entries that a mask selects the only trainable ones of its tensors, in place.

    FISH-Tuning (arXiv 2504.04050), equations 5 and 6, multiplies gradients by the mask; here the
    frozen entries are no parameters at all. No optimizer, weight decay or momentum can move them,
    the state of AdamW holds two numbers per selected entry, and counters tell the truth.

    The k selected entries of a tensor, of shape (k,) for vectors and (k, 1) otherwise, take its
    place among the parameters: `named_parameters` lists them as `lora_A.default.weight`, while
    `lora_A.default.weight` itself and state dicts are the whole tensor. What goes by module or by
    name (freezing, switching and deleting adapters, learning rates) works as without a mask.
    Whoever writes last wins, be it the values or the tensor. A tensor of which every entry is
    selected stays the parameter it was, and so does every parameter that the mask does not name.

    A model can have several masks, for example one for each adapter, on different tensors. Apply
    masks before you build the optimizer. Where torch.distributed has several processes, all of
    them call, before an engine wraps the model.

    Args:
        model: The model, for instance a `PeftModel`.
        mask: A `FishMask`, or any mapping from parameter names to boolean or 0/1 tensors of the
            parameters' shapes. If it is that of a PEFT adapter of another name, which the model
            does not have, it is applied to the active adapter: adapters can be loaded under any
            name.

    Returns:
        The same model.

    Raises:
        ValueError: One of the tensors is masked already; the mask is of another model (unknown
            names, other shapes); it selects entries of a frozen or offloaded parameter, or
            nothing at all; the adapter moves its own budget (AdaLoRA, AdaMSS with `use_asa`), or
            a tensor of which some entries are selected has gradient hooks (CPT and OSF set
            some); an engine wraps the model already, or the processes hold different tensors or
            masks. The model is unchanged.

    Examples:
        >>> model = apply_mask(model, mask)
        >>> get_mask(model) == mask
        True
    """
    check_maskable(model)
    check_mask("mask", mask)
    mask = mask if isinstance(mask, FishMask) else FishMask(mask)
    parameters = dict(model.named_parameters())
    mask = for_active_adapter(model, mask, parameters)
    check_unmasked(model, mask)
    check_fits(parameters, mask)
    check_gradients_unused(model, mask, [name for name, bits in mask.items() if not bits.all()])
    # An engine would send the values alone: what they are written into has to be equal before.
    check_equal(chain((parameters[name] for name in mask), mask.values()))
    state = vars(model).get(STATE)
    if state is None:
        state = MaskState(model)
        vars(model)[STATE] = state
        hook_forward(state, model)
        patch_saving(state, model)
    hooked = set(state.by_module)
    state.add(model, mask)
    for module in state.by_module.keys() - hooked:
        hook_state_dict(state, module)
    patch_model(state, model)
    state.ignore_in_ddp(model)
    warn_of_others(dict(model.named_parameters()), mask, state)
    return model


def remove_mask(model: nn.Module) -> nn.Module:
    """Turn the masked tensors back into ordinary dense parameters, in place.

    They keep the numbers and `requires_grad` that they have now. An optimizer built before holds
    the masked values: build another.

    Args:
        model: A model that `apply_mask` has masked.

    Returns:
        The same model.

    Raises:
        ValueError: The model has no mask.
        RuntimeError: DeepSpeed ZeRO-3 has divided the model.

    Examples:
        >>> model = remove_mask(apply_mask(model, mask))
        >>> get_mask(model) is None
        True
    """
    check_model(model)
    state = state_of(model)
    if state is None:
        raise ValueError("the model has no mask to remove")
    state.dissolve()
    return model


def get_mask(model: nn.Module, adapter: str | None = None) -> FishMask | None:
    """The mask on a model, all masks that were applied to it together.

    Args:
        model: The model, which DistributedDataParallel or torch.compile may have wrapped.
        adapter: Name of an adapter, for the part of the mask that belongs to it.

    Returns:
        The mask, whose tensors are built at each call, or None if there is none.
    """
    check_model(model)
    state = state_of(model)
    if state is None:
        return None
    return state.mask(None if adapter is None else lambda name: belongs_to_adapter(name, adapter))


def is_masked(model: nn.Module) -> bool:
    """Whether a model has a mask, which costs nothing to tell."""
    return state_of(model) is not None


def check_fits_model(model: nn.Module) -> None:
    """Check that a model still has what its masks select from.

    Raises:
        RuntimeError: A layer, head or embedding was removed, replaced or resized.
    """
    if (state := state_of(model)) is not None:
        state.check()


def masked_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trained values of a masked model, one parameter per tensor.

    Together they are the entries that its mask selects, without tensors of which it selects every
    entry: these stay ordinary parameters.
    """
    state = state_of(model)
    return [] if state is None else [trained(t.values) for t in state.tensors if t.is_split]
