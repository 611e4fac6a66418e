"""Metrics by task, as GLUE defines them. They need no download, unlike those of `evaluate`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.tasks import KnownTask

if TYPE_CHECKING:
    import numpy as np
    from transformers import EvalPrediction

logger = logging.getLogger(__name__)

Task = Literal["classification", "regression"]

KNOWN_METRICS: dict[str, Task] = {
    "accuracy": "classification",
    "f1": "classification",
    "f1_macro": "classification",
    "matthews_correlation": "classification",
    "pearson": "regression",
    "spearmanr": "regression",
    "mse": "regression",
}
"""Every metric, with the task that it measures."""

_DEFAULTS: dict[Task, tuple[str, ...]] = {
    "classification": ("accuracy",),
    "regression": ("pearson", "spearmanr", "mse"),
}


def metric_names(
    task: Task, num_labels: int, chosen: str | None = None, known: KnownTask | None = None
) -> tuple[str, ...]:
    """Return the metrics to compute, the main one first.

    Args:
        task: What the model predicts.
        num_labels: Number of classes.
        chosen: The main metric, from `dataset.metric`; by default the first of the task.
        known: The public task, whose metrics are used if they fit `task`.

    Raises:
        ConfigError: If `chosen` is unknown or does not fit the task.
    """
    names = _DEFAULTS[task]
    if known is not None and all(KNOWN_METRICS[name] == task for name in known.metrics):
        names = tuple(name for name in known.metrics if name != "f1" or num_labels == 2)
    if chosen is None:
        return names
    fitting = [name for name, of in KNOWN_METRICS.items() if of == task]
    if chosen not in fitting:
        raise ConfigError(
            f"dataset.metric: {chosen!r} does not measure {task}; use one of {', '.join(fitting)}"
        )
    if chosen == "f1" and num_labels != 2:
        raise ConfigError(
            f"dataset.metric: 'f1' is defined for 2 classes and the data has {num_labels}; "
            "use f1_macro"
        )
    return (chosen, *(name for name in names if name != chosen))


def greater_is_better(name: str) -> bool:
    """Return whether a larger value of the metric is better."""
    return name != "mse"


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
            raise ValueError(
                f"{int((~np.isfinite(logits)).sum())} of {logits.size} predictions are not finite: "
                "training diverged. Lower base_training.args.learning_rate, or use "
                "model.precision: float32."
            )
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
