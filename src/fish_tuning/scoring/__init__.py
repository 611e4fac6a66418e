"""A model and calibration batches -> a score for every trainable entry."""

from fish_tuning.scoring.compare import Agreement, compare_scores
from fish_tuning.scoring.fisher import calculate_fisher_information, score_with_perturbed_b
from fish_tuning.scoring.scores import FishScores

__all__ = [
    "Agreement",
    "FishScores",
    "calculate_fisher_information",
    "compare_scores",
    "score_with_perturbed_b",
]
