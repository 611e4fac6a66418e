"""Metrics of classification and regression, as GLUE defines them, with nothing to download."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fish_tuning.experiments.metrics.names import KNOWN_METRICS, diverged

if TYPE_CHECKING:
    import numpy as np
    from transformers import EvalPrediction

logger = logging.getLogger(__name__)


def compute_metrics_for(names: Sequence[str]) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a `compute_metrics` for a transformers Trainer.

    - Classification predicts the class of the highest logit. `f1` is the F1 score of class 1,
      `f1_macro` the mean over classes.
    - A metric that is undefined is 0: F1 without positives, Matthews correlation if only one class
      is predicted or present, the correlation of a constant. The correlations log it.

    Args:
        names: Names from `KNOWN_METRICS`, all of one task; see `metric_names`.
    """
    task = KNOWN_METRICS[names[0]]

    def compute_metrics(evaluated: EvalPrediction) -> dict[str, float]:
        import numpy as np

        # A model that also returns hidden states gives a tuple with the logits first.
        predictions: Any = evaluated.predictions
        logits = np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)
        labels = np.asarray(evaluated.label_ids)
        if not np.isfinite(logits).all():
            wrong = int((~np.isfinite(logits)).sum())
            raise diverged(f"{wrong} of {logits.size} predictions are not finite")
        predicted = logits.argmax(-1) if task == "classification" else logits.reshape(len(labels))
        return {name: _compute(name, labels, predicted) for name in names}

    return compute_metrics


def _compute(name: str, labels: np.ndarray, predicted: np.ndarray) -> float:
    from scipy import stats
    from sklearn import metrics

    match name:
        case "accuracy":
            return float(metrics.accuracy_score(labels, predicted))
        case "f1":
            return float(metrics.f1_score(labels, predicted, zero_division=0))
        case "f1_macro":
            return float(metrics.f1_score(labels, predicted, average="macro", zero_division=0))
        case "mse":
            return float(metrics.mean_squared_error(labels, predicted))
    if labels.min() == labels.max() or predicted.min() == predicted.max():
        logger.info("%s is undefined where all values are equal; recorded as 0", name)
        return 0.0
    if name == "matthews_correlation":
        return float(metrics.matthews_corrcoef(labels, predicted))
    correlation = stats.pearsonr if name == "pearson" else stats.spearmanr
    value = float(correlation(labels, predicted)[0])
    # Values that differ by less than the floating-point resolution still give NaN.
    return value if math.isfinite(value) else 0.0
