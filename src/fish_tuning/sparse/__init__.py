"""A mask on a model: its selected entries become the only trainable ones, and back."""

from fish_tuning.sparse.apply import apply_mask, get_mask, is_masked, masked_parameters, remove_mask

__all__ = ["apply_mask", "get_mask", "is_masked", "masked_parameters", "remove_mask"]
