"""A model and calibration batches -> a score for every trainable entry."""

from fish_tuning.scoring.fisher import calculate_fisher_information, score_with_perturbed_b

__all__ = ["calculate_fisher_information", "score_with_perturbed_b"]
