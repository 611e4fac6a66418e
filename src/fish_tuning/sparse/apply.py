"""A mask on a model: the selected entries become its only trainable numbers, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from itertools import chain

from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import PeftType
from torch import Tensor, nn

from fish_tuning.distributed import check_equal
from fish_tuning.engines import check_in_memory, check_maskable
from fish_tuning.mask.mask import FishMask
from fish_tuning.sparse.holder import HOLDER, Holder, holder_of
from fish_tuning.sparse.publishing import accompany, leave_alone


def apply_mask(model: nn.Module, mask: Mapping[str, Tensor]) -> nn.Module:
    """Makes the entries that a mask selects the only trainable ones of its tensors, in place.

    FISH-Tuning (arXiv 2504.04050) equations 5 and 6 multiply gradients by the mask; here the
    frozen entries are no parameters at all. No optimizer, weight decay or momentum can move them,
    optimizer state holds two numbers for each selected entry under AdamW, and counters tell the
    truth. A tensor that is selected whole stays the ordinary parameter it was, and so does every
    parameter that the mask does not name.

    Apply the mask before the optimizer is built, and call the model that was masked: gradients
    of a forward pass that goes around it (a submodule called directly) raise in backward. Where
    torch.distributed has several processes, all of them call, before an engine wraps the model.

    Args:
        model: The model, for instance a `PeftModel`.
        mask: A `FishMask`, or any mapping from parameter names to boolean or 0/1 tensors of the
            parameters' shapes.

    Returns:
        The same model.

    Raises:
        ValueError: The model has a mask already; the mask is of another model (unknown names,
            other shapes); it selects entries of a frozen or offloaded parameter, or nothing at
            all; the adapter
            moves its own budget (AdaLoRA, AdaMSS with `use_asa`), or a tensor that is selected in
            part has gradient hooks (CPT and OSF set some); an engine wraps the model already, or
            the processes hold different tensors or masks. The model is unchanged.
    """
    check_maskable(model)
    if get_mask(model) is not None:
        raise ValueError("the model has a mask already: call remove_mask(model) first")
    if hasattr(model, HOLDER):
        raise ValueError(
            f"the model has an attribute {HOLDER!r} of its own, the name under which a mask keeps "
            "the trainable values: rename it"
        )
    mask = mask if isinstance(mask, FishMask) else FishMask(mask)
    parameters = dict(model.named_parameters())
    _check_fits(parameters, mask)
    check_gradients_unused(model, mask, [name for name, bits in mask.items() if not bits.all()])
    # An engine would send the values alone: what they are written into has to be equal before.
    check_equal(chain((parameters[name] for name in mask), mask.values()))
    model.add_module(HOLDER, Holder(model, parameters, mask))
    accompany(model)
    return model


def remove_mask(model: nn.Module) -> nn.Module:
    """Turns the masked tensors back into ordinary, trainable dense parameters, in place.

    Their values stay as trained. An optimizer built before holds the masked values and has to be
    built anew.

    Args:
        model: A model that `apply_mask` has masked.

    Returns:
        The same model.

    Raises:
        ValueError: The model has no mask.
    """
    holder = holder_of(model)
    if holder is None:
        raise ValueError("the model has no mask to remove")
    # The model may be wrapped, in torch.compile for instance.
    owner = next(module for module in model.modules() if module._modules.get(HOLDER) is holder)
    leave_alone(owner)
    holder.dissolve(owner)
    delattr(owner, HOLDER)
    return model


def get_mask(model: nn.Module) -> FishMask | None:
    """The mask on a model, or None; its tensors are made anew at each call."""
    holder = holder_of(model)
    return None if holder is None else holder.mask()


def masked_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable vectors of a masked model: together, the selected entries of its mask."""
    holder = holder_of(model)
    return [] if holder is None else [group.values for group in holder.groups]


def _check_fits(parameters: Mapping[str, nn.Parameter], mask: FishMask) -> None:
    if unknown := [name for name in mask if name not in parameters]:
        near = get_close_matches(unknown[0], parameters, 1)
        raise ValueError(
            f"the mask names {len(unknown)} of {len(mask)} tensors that are no parameters of this "
            f"model: {_some(unknown)}" + (f" (nearest: {near[0]})" if near else "") + ". Was it "
            "made for another model, or another adapter name?"
        )
    misshapen = [
        f"{name} is {tuple(parameters[name].shape)}, its mask {tuple(bits.shape)}"
        for name, bits in mask.items()
        if parameters[name].shape != bits.shape
    ]
    if misshapen:
        raise ValueError(
            f"{len(misshapen)} tensors have another shape than their mask: {_some(misshapen)}. "
            "Was the mask made for another rank?"
        )
    if mask.num_trainable == 0:
        raise ValueError("the mask selects no entry, so there is nothing to train")
    frozen = [
        name for name, bits in mask.items() if not parameters[name].requires_grad and bits.any()
    ]
    if frozen:
        raise ValueError(
            f"the mask selects entries of {len(frozen)} frozen parameters: {_some(frozen)}. Set "
            "requires_grad on them first (PeftModel.from_pretrained takes is_trainable=True)"
        )
    check_in_memory({name: parameters[name] for name in mask})


def check_gradients_unused(model: nn.Module, masked: Iterable[str], in_part: Iterable[str]) -> None:
    """Refuses adapters and tensors that need their dense gradients for more than training.

    Args:
        model: The model.
        masked: Parameters that a mask names.
        in_part: Those of them that it does not select whole.

    Raises:
        ValueError: As `apply_mask` says.
    """
    masked, parameters = list(masked), dict(model.named_parameters())
    for path, module in model.named_modules():
        configs = getattr(module, "peft_config", None)
        for adapter, config in configs.items() if isinstance(configs, dict) else ():
            adalora = config.peft_type == PeftType.ADALORA
            if not adalora and not getattr(config, "use_asa", False):
                continue
            prefix = PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]
            own = re.compile(rf"^{re.escape(path)}.*\.{prefix}\w+\.{re.escape(adapter)}(\.|$)")
            if any(own.search(name) for name in masked):
                raise ValueError(
                    f"{'AdaLoRA' if adalora else 'AdaMSS with use_asa'} moves its own budget while "
                    "it trains, which a mask keeps where it is: mask another adapter, or train "
                    "this one without a mask"
                )
    hooked = [
        name
        for name in in_part
        if parameters[name]._backward_hooks or parameters[name]._post_accumulate_grad_hooks
    ]
    if hooked:
        raise ValueError(
            f"{len(hooked)} tensors that the mask selects from have gradient hooks, which would be "
            f"lost (CPT and OSF set such hooks): {_some(hooked, 1)}. Select these tensors whole or "
            "leave them out of the mask"
        )


def _some(names: list[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
