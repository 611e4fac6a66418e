"""Methods of masked models and their modules that know of the mask, and the reason for each.

PyTorch has hooks for forward passes and state dicts, which `hooks` and `state_dict` use. What else
a masked model has to notice happens in methods without hooks. They are replaced on the instances,
so that no other model is affected, and given back when the mask is taken off. Each is a partial of
a function here, which, unlike a bound method, can be copied and pickled with the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from fish_tuning.masked_tensors.parameters import as_buffers
from fish_tuning.masked_tensors.sharded import check_whole
from fish_tuning.masked_tensors.structure import entrances
from fish_tuning.masked_tensors.tensors import MaskedTensor, Place, as_leaf
from fish_tuning.names import without_wrappers
from fish_tuning.sparse.deepspeed import follow_engines
from fish_tuning.sparse.state import MaskState
from fish_tuning.sparse.state_dict import load_tensors, owned


def patch_model(state: MaskState, root: nn.Module) -> None:
    """Patch what reads or changes masked tensors, in a model and its modules."""
    for module in entrances(root):
        patch(state, module, "named_modules", _named_modules)
    for module in root.modules():
        if module is root or module in state.by_module:
            patch(state, module, "_apply", _apply)
        if module in state.by_module:
            patch(state, module, "_load_from_state_dict", _load)
        if isinstance(module, PeftModel):
            patch(state, module, "delete_adapter", _release_deleted)
            patch(state, module, "get_parameter", _get_parameter)
        if isinstance(module, BaseTuner):
            patch(state, module, "_unload_and_optionally_merge", _unload)
            patch(state, module, "add_weighted_adapter", _read)
        if isinstance(module, BaseTunerLayer):
            patch(state, module, "supports_lora_conversion", _check_convertible)
        holds_masked = any(inner in state.by_module for inner in module.modules())
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and holds_masked:
            for name in ("merge", "unmerge"):
                patch(state, module, name, _merge)
            patch(state, module, "get_delta_weight", _read)
            for name in ("set_adapter", "set_requires_grad", "enable_adapters"):
                patch(state, module, name, _set_requires_grad)
            patch(state, module, "delete_adapter", _release_deleted)


def patch(state: MaskState, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Replace a module's method, if it has one of that name, until the mask is taken off.

    Args:
        state: The state of the mask.
        module: The module.
        name: The method's name.
        function: Takes the state, the module, the method's name, and the method's arguments.
    """
    if callable(getattr(type(module), name, None)) and name not in vars(module):
        vars(module)[name] = functools.partial(function, state, module, name)
        if module is not state.root():
            state.uninstallers.append(functools.partial(_unpatch, module, name))


def _unpatch(module: nn.Module, name: str) -> None:
    vars(module).pop(name, None)


def original(module: nn.Module, name: str) -> Callable[..., Any]:
    """A module's own method of a name."""
    return functools.partial(getattr(type(module), name), module)


def _apply(state: MaskState, module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    """Casts and moves: PyTorch moves buffers, whose gradients have to reach the values."""
    # What was written before a cast would otherwise differ from what the cast rounds.
    state.update(module)
    split = [each for each in owned(state, module) if each[0].is_split]
    before = {place: vars(module).get(place.attribute) for _, _, place in split}
    held = [place for tensor, _, place in split if before[place] is not None]
    with as_buffers([p for p in held if p.attribute in module._parameters], with_values=True):
        result = original(module, name)(*args, **kwargs)
    for tensor, view, place in split:
        was, now = before[place], vars(module).get(place.attribute)
        if was is None or now is None or now is was or not was.requires_grad:
            continue
        if was.grad_fn is not None:
            # In a forward pass, maybe without gradients: diffusers casts layers as they compute.
            with torch.enable_grad():
                vars(module)[place.attribute] = was.to(now)
        else:
            leaf = as_leaf(now, requires_grad=True)
            tensor.receive_from(view, leaf)
            vars(module)[place.attribute] = leaf
    if module is state.root():
        state.update()
    return result


def _named_modules(
    state: MaskState,
    module: nn.Module,
    name: str,
    memo: set[nn.Module] | None = None,
    prefix: str = "",
    remove_duplicate: bool = True,
) -> Any:
    """What reads tensors with no method of the model's lists its modules first.

    PEFT's get_layer_status wants to know what requires gradients, optimizers and engines want the
    parameters, and torch.export takes the tensors. PEFT looks for an adapter in a state dict by the
    names of modules, and state dicts leave out torch's checkpoint wrappers.
    """
    if not (torch.compiler.is_compiling() or torch.compiler.is_exporting()):
        follow_engines()
        state.show_values()
        if not remove_duplicate:
            state.update_intact()
    listed = original(module, name)(memo, prefix, remove_duplicate)
    return ((without_wrappers(path), inner) for path, inner in listed)


def _load(
    state: MaskState, module: nn.Module, name: str, loaded: dict[str, Any], *args: Any
) -> None:
    """State dicts hold tensors: PyTorch would load them into the values."""
    load_tensors(state, module, original(module, name), loaded, *args)


def _read(state: MaskState, module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    """PEFT reads tensors: values may have been written since the last forward pass."""
    state.update()
    return original(module, name)(*args, **kwargs)


def _merge(state: MaskState, module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    """The base weights that PEFT adds tensors to have to be whole, as the tensors are."""
    values = (value for group in state.groups for value in group.values())
    check_whole(values, "an adapter cannot be merged into")
    return _read(state, module, name, *args, **kwargs)


def _check_convertible(
    state: MaskState, module: nn.Module, name: str, *args: Any, **kwargs: Any
) -> Any:
    """PEFT asks this before it converts a model to LoRA, and then copies what it saves whole.

    Raises:
        ValueError: It would copy the values of a masked module in place of its tensors.
    """
    names = (t.name for t in state.tensors if t.num_selected < t.numel)
    if whole := [each for each in names if ".modules_to_save." in each]:
        raise ValueError(
            f"PEFT cannot convert a masked adapter with modules_to_save to LoRA, because it copies "
            f"the parameters of these modules, such as {whole[0]}: call remove_mask(model) first"
        )
    return original(module, name)(*args, **kwargs)


def _get_parameter(state: MaskState, module: nn.Module, name: str, target: str) -> Any:
    """A masked tensor is found by its name, though it is no parameter.

    Raises:
        ValueError: TRL's DPOTrainer, which copies parameters of one adapter to another by name,
            finds no mask on the other.
    """
    masked = {
        place.name: (tensor, view, place)
        for tensor in state.tensors
        for view, place in tensor.views_and_places()
        if tensor.num_selected < tensor.numel
    }
    if target in masked:
        tensor, view, place = masked[target]
        return tensor.held(view, place)
    if target.replace(".ref.", ".default.") in masked:
        raise ValueError(
            f"{target} is to be copied from a masked adapter, and its own adapter has no mask. "
            "DPOTrainer copies the parameters of the adapter to one that it calls 'ref', without "
            "what a mask has frozen: leave the model as it is and pass FishTuningCallback(mask)"
        )
    return original(module, name)(target)


def _unload(state: MaskState, module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    """PEFT takes its layers out of the model, which is to be an ordinary one again."""
    state.dissolve()
    return original(module, name)(*args, **kwargs)


def _release_deleted(
    state: MaskState, module: nn.Module, name: str, *args: Any, **kwargs: Any
) -> Any:
    """PEFT deletes an adapter: its tensors leave the mask."""
    before = _held(state, module)
    result = original(module, name)(*args, **kwargs)
    after = _held(state, module)
    gone = [tensor for tensor, places in before.items() if after.get(tensor) != places]
    # The layers' own methods have released some already.
    state.release(tensor for tensor in gone if tensor in state.tensors)
    return result


def _held(state: MaskState, module: nn.Module) -> dict[MaskedTensor, int]:
    """The masked tensors of a module and its submodules, with the number of their places."""
    count: dict[MaskedTensor, int] = {}
    for inner in module.modules():
        for tensor in state.by_module.get(inner, []):
            names = [place.attribute for place in tensor.places if place.module is inner]
            held = sum(name in inner._buffers or name in inner._parameters for name in names)
            count[tensor] = count.get(tensor, 0) + held
    return count


def _set_requires_grad(
    state: MaskState, module: nn.Module, name: str, *args: Any, **kwargs: Any
) -> Any:
    """PEFT freezes or thaws an adapter: its values follow, which PEFT reaches only in modules.

    Tensors of which nothing is selected are no parameters: they note the flag for the time after
    the mask.
    """
    tensors = list({t: None for inner in module.modules() for t in state.by_module.get(inner, [])})
    with _as_parameters([tensor for tensor in tensors if tensor.is_frozen]):
        result = original(module, name)(*args, **kwargs)
    # Now, and not at the next forward pass: checkpointing may run a layer again before it.
    for group in {tensor.group: None for tensor in tensors if tensor.group is not None}:
        group.agree_on_training()
    return result


@contextmanager
def _as_parameters(tensors: list[MaskedTensor]) -> Iterator[None]:
    """Let PEFT find unselected tensors as the parameters that they were."""
    # One of its methods may call another.
    tensors = [t for t in tensors if all(p.attribute in p.module._buffers for p in t.places)]
    buffers: dict[Place, Tensor] = {}
    for tensor in tensors:
        for place in tensor.places:
            buffer = place.module._buffers.pop(place.attribute)
            assert buffer is not None
            buffers[place] = buffer
            parameter = nn.Parameter(buffer, tensor.was_trainable)
            place.module._parameters[place.attribute] = parameter
    try:
        yield
    finally:
        for tensor in tensors:
            for place in tensor.places:
                held = place.module._parameters.pop(place.attribute)
                assert held is not None
                tensor.was_trainable = held.requires_grad
                place.module._buffers[place.attribute] = buffers[place]
