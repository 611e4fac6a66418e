"""Gradient checkpointing of a model that no Trainer has seen yet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def enable_checkpointing(model: nn.Module, args: Mapping[str, Any]) -> None:
    """Turn gradient checkpointing on if the training arguments do, as a Trainer does later.

    Args:
        model: The model, with its adapter.
        args: The training arguments.
    """
    if not args.get("gradient_checkpointing"):
        return
    kwargs = dict(args.get("gradient_checkpointing_kwargs") or {})
    kwargs.pop("selective", None)  # TRL's own, which its Trainer takes out again.
    enable: Any = model.gradient_checkpointing_enable
    enable(gradient_checkpointing_kwargs=kwargs or None)
