"""Scores and a budget -> a mask of exactly k entries."""

from fish_tuning.selection.criteria import magnitude_scores, random_scores, reversed_scores
from fish_tuning.selection.select import create_mask_from_fisher

__all__ = ["create_mask_from_fisher", "magnitude_scores", "random_scores", "reversed_scores"]
