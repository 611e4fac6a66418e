"""Whether a mask fits a model, checked before anything is changed."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import PeftType
from torch import nn

from fish_tuning.engines import check_in_memory
from fish_tuning.mask.mask import FishMask
from fish_tuning.sparse.registry import STATE, state_of
from fish_tuning.sparse.state import MaskState

logger = logging.getLogger(__name__)


def check_unmasked(model: nn.Module, mask: Mapping[str, object]) -> None:
    """Check that a mask adds to the masks that a model has, if any.

    Raises:
        ValueError: A tensor is masked already, or a module inside or around the model is.
    """
    state = state_of(model)
    holders = [module for module in model.modules() if STATE in vars(module)]
    if state is None and not holders:
        return
    if holders != [model]:
        raise ValueError(
            "a module inside or around this model has a mask already: apply further masks to the "
            "same module, or call remove_mask(model) first"
        )
    assert state is not None
    if again := sorted(masked_names(state).intersection(mask)):
        raise ValueError(
            f"the model has a mask already: call remove_mask(model) first, or leave out the "
            f"{len(again)} tensors that are masked: {_some(again)}"
        )


def masked_names(state: MaskState) -> set[str]:
    """The names under which a state's tensors are held."""
    return {place.name for tensor in state.tensors for place in tensor.places}


def check_fits(parameters: Mapping[str, nn.Parameter], mask: FishMask) -> None:
    """Check that a mask is one of these parameters.

    Raises:
        ValueError: It names unknown parameters, has other shapes, selects nothing, or selects
            entries of a frozen or offloaded parameter.
    """
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


def warn_of_others(
    parameters: Mapping[str, nn.Parameter], mask: FishMask, state: MaskState
) -> None:
    """Say how many trainable parameters a mask leaves as they are, after it was applied.

    A mask may leave parameters out on purpose (a head that is trained as a whole), so that this is
    no error; one that was made for a model of fewer layers leaves them out by mistake.
    """
    ours = masked_names(state)
    left = {n: p.numel() for n, p in parameters.items() if p.requires_grad and n not in ours}
    if left:
        logger.warning(
            "The mask leaves out %d trainable tensors, all %s entries of which are trained beside "
            "the %s that it selects: %s. Freeze them if they are not to be trained",
            len(left),
            f"{sum(left.values()):,}",
            f"{mask.num_trainable:,}",
            _some(list(left)),
        )


def check_gradients_unused(model: nn.Module, masked: Iterable[str], in_part: Iterable[str]) -> None:
    """Refuse adapters and tensors that need their dense gradients for more than training.

    Of the masked parameters, `in_part` are those of which not every entry is selected.
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
                    "it trains, which a mask would fix: mask another adapter, or train this one "
                    "without a mask"
                )
    hooked = [
        name
        for name in in_part
        if parameters[name]._backward_hooks or parameters[name]._post_accumulate_grad_hooks
    ]
    if hooked:
        raise ValueError(
            f"{len(hooked)} tensors that the mask selects from have gradient hooks, which would be "
            f"lost (CPT and OSF set such hooks): {_some(hooked, 1)}. Select every entry of these "
            "tensors, or leave them out of the mask"
        )


def _some(names: list[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
