"""The mask: boolean tensors by parameter name, its files and its section in the model card."""

from fish_tuning.mask.mask import FishMask

__all__ = ["FishMask"]
