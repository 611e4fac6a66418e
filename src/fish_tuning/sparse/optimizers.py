"""Optimizers that compute with whole matrices cannot train the values of a mask."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from fish_tuning.sparse.registry import states

_BY_MATRIX = {"LoraFAOptimizer", "RiemannianPreconditionedOptimizer", "Muon"}
"""PEFT's multiply A and B, and Muon orthogonalizes. By name: PEFT defines one in a function."""


def check_optimizer(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Refuse to step a masked model with an optimizer that computes with whole matrices.

    The shapes of the values often do not fit, but with rank 1, or a single selected entry, they
    do, and the step would be wrong.

    Raises:
        ValueError: The optimizer is one of these and holds parameters of a masked model.
    """
    kinds = _BY_MATRIX.intersection(kind.__name__ for kind in type(optimizer).__mro__)
    if not kinds:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for state in states():
        parameters = (p for module in state.by_module for p in module._parameters.values())
        is_partial = any(tensor.num_selected < tensor.numel for tensor in state.tensors)
        if is_partial and any(id(p) in held for p in parameters):
            raise ValueError(
                f"{kinds.pop()} computes with whole matrices, but of a masked tensor only the "
                "selected entries are trained, as a list of values: use an optimizer that treats "
                "each number by itself, such as AdamW, or call remove_mask(model) and build the "
                "optimizer again"
            )
