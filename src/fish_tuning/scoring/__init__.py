"""A model and calibration batches -> a score for every trainable entry."""

from fish_tuning.scoring.alignment import align_with_fisher
from fish_tuning.scoring.fisher import calculate_fisher_information, score_with_perturbed_b

__all__ = ["align_with_fisher", "calculate_fisher_information", "score_with_perturbed_b"]
