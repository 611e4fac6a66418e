"""A built Trainer -> scores and a mask, from its own data, collator and loss."""

from fish_tuning.from_trainer.masking import mask_trainer

__all__ = ["mask_trainer"]
