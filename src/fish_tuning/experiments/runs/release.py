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
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    vars(model).pop("_is_accelerate_prepared", None)
    trainer.accelerator._models.clear()
