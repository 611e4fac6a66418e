"""A model in evaluation mode, given back as it was."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from fish_tuning.engines import device_of
from fish_tuning.scoring.checkpointing import checkpointing


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in evaluation mode and gradients are on.

    Modes, configs and random number generators are restored afterwards.

    Raises:
        ValueError: Gradients cannot be on.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode() permits no gradients: score the model outside it")
    modes = {module: module.training for module in model.modules()}
    configs = _configs_of(model)
    before = {module: _state_of(module) for module in model.modules()}
    states = random.getstate(), np.random.get_state()
    device = device_of(model)
    with (
        torch.random.fork_rng(
            devices=[] if device.type == "cpu" else [device], device_type=device.type
        ),
        torch.enable_grad(),
        checkpointing(model),
    ):
        try:
            model.eval()
            yield
        finally:
            for module, state in before.items():
                _restore(module, *state)
            for module, mode in modes.items():
                if module.training != mode:
                    module.training = mode
            for settings, values in configs:
                settings.clear()
                settings.update(values)
            random.setstate(states[0])
            np.random.set_state(states[1])


def _configs_of(model: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The settings of each config in a model, and a copy of them.

    transformers notes the kind of labels that it saw first, `problem_type`.
    """
    configs = {id(c): c for m in model.modules() if (c := vars(m).get("config")) is not None}
    settings = [vars(config) for config in configs.values() if hasattr(config, "__dict__")]
    return [(values, dict(values)) for values in settings]


_Caches = dict[str, tuple[Any, torch.Tensor | None]]
_State = tuple[dict[str, Any], dict[str, Any], _Caches]


def _state_of(module: nn.Module) -> _State:
    """What a forward pass may change in a module: settings, children and caches in buffers.

    BigBird replaces its attention when a text is short. RoPE may grow with the longest one, and
    then replaces its frequencies or writes into them.
    """
    settings = {k: v for k, v in vars(module).items() if isinstance(v, _SETTINGS)}
    caches: _Caches = {}
    for name in module._non_persistent_buffers_set:
        buffer = module._buffers.get(name)
        numbers = buffer.clone() if buffer is not None and buffer.is_floating_point() else None
        caches[name] = buffer, numbers
    return settings, dict(module._modules), caches


_SETTINGS = (bool, int, float, str)


def _restore(
    module: nn.Module, settings: dict[str, Any], children: dict[str, Any], caches: _Caches
) -> None:
    for name, value in settings.items():
        if name != "training" and vars(module).get(name) != value:
            vars(module)[name] = value
    for name, child in children.items():
        if module._modules.get(name) is not child:
            module._modules[name] = child
    for name, (cache, numbers) in caches.items():
        if numbers is not None:
            cache.copy_(numbers)
        if name in module._buffers and module._buffers[name] is not cache:
            module._buffers[name] = cache
