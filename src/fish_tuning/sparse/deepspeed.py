"""What DeepSpeed's engines do to masked models where no hook sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fish_tuning.engines import follow_deepspeed
from fish_tuning.sparse.registry import states
from fish_tuning.sparse.state_dict import with_tensors


def follow_engines() -> None:
    """Have masked tensors follow DeepSpeed's engines, if the program has imported DeepSpeed."""
    follow_deepspeed(
        ("step", _up_to_date),
        ("load_checkpoint", _up_to_date),
        # What accelerate, Trainers and the engine's save_16bit_model write.
        ("_zero3_consolidated_16bit_state_dict", _of_tensors),
    )


def _up_to_date(model: nn.Module, result: Any) -> Any:
    stepped = {id(parameter) for parameter in model.parameters()}
    for state in states():
        state.after_step(stepped)
    return result


def _of_tensors(model: nn.Module, saved: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A state dict of an engine's model, with tensors in place of their values.

    The masked model may be a part of it. Processes other than the first have no state dict.
    """
    for state in states() if saved is not None else ():
        root = state.root()
        path = next((path for path, module in model.named_modules() if module is root), None)
        if path is None or saved is None:
            continue
        prefix = f"{path}." if path else ""
        own = {name.removeprefix(prefix): saved[name] for name in saved if name.startswith(prefix)}
        whole = with_tensors(state, own)
        saved = {**saved, **{prefix + name: tensor for name, tensor in whole.items()}}
    return saved
