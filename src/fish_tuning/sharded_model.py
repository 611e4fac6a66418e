"""Models whose parameters `fully_shard` (FSDP2) has divided, and what scoring has to know of them.

Between forward passes, the modules hold DTensors, of which each process has some rows. In a forward
or backward pass they hold the complete parameters for a while; these are the leaves that autograd
computes gradients for. torch records which leaf belongs to which DTensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fish_tuning.names import without_wrappers


class ShardedModel:
    """The modules of a model that `fully_shard` has divided; in most models there are none.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        modules: list[Any] = [m for m in model.modules() if hasattr(m, "_get_fsdp_state")]
        # Modules that were divided together share a state.
        self._states: list[Any] = list(dict.fromkeys(m._get_fsdp_state() for m in modules))

    @property
    def _groups(self) -> Iterator[Any]:
        for state in self._states:
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            yield from (group for group in groups if group is not None)

    @property
    def parameters(self) -> list[Tensor]:
        """The divided parameters."""
        return [record.sharded_param for group in self._groups for record in group.fsdp_params]

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The types that a mixed-precision policy casts parameters to."""
        return {d for s in self._states if (d := s._mp_policy.param_dtype) is not None}

    def name_of(self, name: str) -> str:
        """The name that a parameter has before the model is sharded.

        Between the two steps, torch's checkpoint wrappers may have been put around layers.
        """
        return without_wrappers(name) if self._states else name

    def leaves(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The tensors that autograd gives the gradients of these parameters for.

        A forward pass has to be over. Its backward pass has the same leaves.
        """
        records = (record for group in self._groups for record in group.fsdp_params)
        complete = {id(r.sharded_param): getattr(r, "_unsharded_param", None) for r in records}
        leaves = [complete.get(id(parameter)) for parameter in parameters]
        return [p if leaf is None else leaf for p, leaf in zip(parameters, leaves, strict=True)]

    def settle(self) -> None:
        """Divides all parameters again, whatever forward or backward pass was interrupted.

        Without this, a module's next forward pass would be taken for a part of the last one.
        """
        for state in self._states:
            if state._is_root:
                state._reset_iter_state()
        for group in self._groups:
            group.reshard()

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Inside the block, backward passes leave the gradients of the parameters alone.

        Raises:
            ValueError: The state of `fully_shard` does not allow scoring.
        """
        self._check()
        groups = list(self._groups)
        before = [getattr(group, _UNUSED, False) for group in groups]
        contexts = list({id(state._state_ctx): state._state_ctx for state in self._states}.values())
        last = [context.is_last_backward for context in contexts]
        self.settle()
        try:
            for group, value in zip(groups, before, strict=True):
                if value:
                    setattr(group, _UNUSED, False)
            for context in contexts:
                context.is_last_backward = True
            yield
        finally:
            self.settle()
            for group, value in zip(groups, before, strict=True):
                if value:
                    setattr(group, _UNUSED, True)
            for context, value in zip(contexts, last, strict=True):
                context.is_last_backward = value

    def _check(self) -> None:
        if self._states and not hasattr(self._states[0], "_reset_iter_state"):
            raise ValueError(
                f"torch {torch.__version__} cannot take back an interrupted pass of fully_shard: "
                "install torch 2.13 or newer, or score the model before it is sharded"
            )
        for group in self._groups:
            if any(map(_is_waiting, group.fsdp_params)) or group._partial_reduce_output is not None:
                raise ValueError(
                    "fully_shard holds gradients that have not been exchanged yet "
                    "(set_requires_gradient_sync(False)): score the model after an optimizer step"
                )
            if any(r.sharded_param.device.type != group.device.type for r in group.fsdp_params):
                raise ValueError(
                    "fully_shard keeps the parameters on another device than it computes on "
                    "(CPUOffloadPolicy): score the model with parameters on the device"
                )


_UNUSED = "reduce_scatter_unused_params"
"""Setting that has a backward pass write gradients of 0."""


def _is_waiting(record: Any) -> bool:
    """Whether a complete parameter has a gradient that its part does not have yet."""
    complete = getattr(record, "_unsharded_param", None)
    return record.unsharded_accumulated_grad is not None or (
        complete is not None and complete.grad is not None
    )
