"""Give a model back after a Trainer has evaluated or trained it."""

from __future__ import annotations

from torch import nn
from transformers import Trainer


def release_model(trainer: Trainer, model: nn.Module) -> None:
    """Undo what accelerate did to a model, so that it is prepared again for the next training.

    Otherwise it is taken as it is: several processes would train apart from each other, and mixed
    precision would wrap the forward pass twice or not at all.

    Args:
        trainer: The Trainer that evaluated or trained it.
        model: The model without what engines wrap around it.
    """
    wrapped = vars(model).get("_original_forward")
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if wrapped is not None:
        # Mixed precision alone is undone. accelerate would take off what a Trainer has put around
        # the forward pass of a model without an adapter, too.
        vars(model)["forward"] = wrapped
    vars(model).pop("_is_accelerate_prepared", None)
    trainer.accelerator._models.clear()
