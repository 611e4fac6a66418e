"""What PyTorch's sharding has to be told: a parameter's name leads `getattr` to a masked tensor.

FSDP2 and distributed checkpoints look for parameters again where no hook of ours can run, so the
functions that do are wrapped. FSDP1 is told nothing: it refuses masked models. For modules without
masked tensors all of them do what they did.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fish_tuning.masked_tensors.parameters import UNSELECTED
from fish_tuning.masked_tensors.tensors import MaskedTensor

_loading: list[bool] = []
"""Not empty while a distributed checkpoint is loaded."""


def check_not_cast(
    root: nn.Module, tensors: Iterable[MaskedTensor], dtypes: set[torch.dtype]
) -> None:
    """Check that no mixed-precision policy of `fully_shard` leaves masked tensors behind.

    It casts what it divides: values, but not their tensors. Adapter layers cast their inputs to the
    type of their tensors; other modules would mix two types.

    Args:
        root: The model.
        tensors: Its masked tensors.
        dtypes: The types that policies cast parameters to.

    Raises:
        RuntimeError: One does.
    """
    if not dtypes:
        return
    layers = (layer for layer in root.modules() if isinstance(layer, BaseTunerLayer))
    in_adapters = {module for layer in layers for module in layer.modules()}
    for tensor in tensors:
        if not (tensor.is_split or tensor.is_frozen):
            continue  # It is a parameter, which is cast.
        held = tensor.views[0].leaf.dtype
        if dtypes != {held} and any(place.module not in in_adapters for place in tensor.places):
            raise RuntimeError(
                f"fully_shard's mixed precision (param_dtype) casts the model to "
                f"{', '.join(map(str, dtypes))}, but not {tensor.name}, which is masked and "
                f"{held}: leave param_dtype out and compute under autocast, or load the model in "
                "that type"
            )


@functools.cache
def let_sharding_find_values() -> None:
    """Have sharding take the values for a module's parameters, and loading take the tensors."""
    if not dist.is_available():
        return
    from torch.distributed.checkpoint import state_dict as checkpoint
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    wrap: Any = FullyShardedDataParallel.__init__
    of_sharded: Any = FSDPParam.reset_sharded_param

    @functools.wraps(wrap)
    def wrap_unmasked(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        _check_unmasked(module)
        wrap(self, module, *args, **kwargs)

    @functools.wraps(of_sharded)
    def reset_sharded_param(self: Any) -> Any:
        with _hidden([(self._module_info.module, self._module_info.param_name)]):
            return of_sharded(self)

    replaced: Any = FullyShardedDataParallel, FSDPParam
    replaced[0].__init__ = wrap_unmasked
    replaced[1].reset_sharded_param = reset_sharded_param
    _let_loading_find_tensors(checkpoint)


def _check_unmasked(model: nn.Module) -> None:
    """Check, before FullyShardedDataParallel changes a model, that nothing in it is masked.

    Raises:
        ValueError: Something is.
    """
    attributes = ((vars(module), module._parameters) for module in model.modules())
    if any(UNSELECTED in own or own.keys() & parameters for own, parameters in attributes):
        raise ValueError(
            "FullyShardedDataParallel (FSDP1) cannot train a masked model: shard it with "
            "fully_shard (FSDP2; fsdp_version: 2 in accelerate's config)"
        )


def _let_loading_find_tensors(checkpoint: Any) -> None:
    """Have `set_model_state_dict` load tensors in full, and not cut as their values are."""
    load, list_states = checkpoint._load_model_state_dict, checkpoint._iterate_valid_model_state

    @functools.wraps(load)
    def load_model_state_dict(*args: Any, **kwargs: Any) -> Any:
        _loading.append(True)
        try:
            return load(*args, **kwargs)
        finally:
            _loading.pop()

    @functools.wraps(list_states)
    def iterate_valid_model_state(model: nn.Module, *args: Any) -> Iterator[tuple[str, Any]]:
        tensors = _tensors_by_values(model) if _loading else {}
        for name, state in list_states(model, *args):
            yield name, tensors.get(id(state), state)

    checkpoint._load_model_state_dict = load_model_state_dict
    checkpoint._iterate_valid_model_state = iterate_valid_model_state


def _tensors_by_values(model: nn.Module) -> dict[int, Tensor]:
    return {
        id(values): vars(module)[name]
        for module in model.modules()
        for name, values in module._parameters.items()
        if name in vars(module)
    }


@contextmanager
def _hidden(places: Iterable[tuple[nn.Module, str]]) -> Iterator[None]:
    """Let `getattr` find the values in these places, which are the modules' parameters."""
    held = [
        (vars(module), name, vars(module).pop(name))
        for module, name in places
        if name in module._parameters and name in vars(module)
    ]
    try:
        yield
    finally:
        for attributes, name, tensor in held:
            attributes[name] = tensor
