"""Scores and a budget -> a mask of exactly k entries, or a rank for every layer."""

from fish_tuning.selection.criteria import magnitude_scores, random_scores, reversed_scores
from fish_tuning.selection.ranks import create_ranks_from_fisher
from fish_tuning.selection.select import create_mask_from_fisher

__all__ = [
    "create_mask_from_fisher",
    "create_ranks_from_fisher",
    "magnitude_scores",
    "random_scores",
    "reversed_scores",
]
