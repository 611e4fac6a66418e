"""Every metric's name, the task that it measures, and which ones an experiment reports."""

from __future__ import annotations

from typing import Literal

from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.tasks import KnownTask

Task = Literal["classification", "regression", "causal_lm"]

CAUSAL_LM: Task = "causal_lm"
"""The `dataset.task` of a language model that continues text."""

TEXT_METRICS = ("exact_match", "bleu", "rouge_l")
"""The metrics that compare generated texts with the data's."""

KNOWN_METRICS: dict[str, Task] = {
    "accuracy": "classification",
    "f1": "classification",
    "f1_macro": "classification",
    "matthews_correlation": "classification",
    "pearson": "regression",
    "spearmanr": "regression",
    "mse": "regression",
    "loss": "causal_lm",
    "perplexity": "causal_lm",
    "token_accuracy": "causal_lm",
    "exact_match": "causal_lm",
    "bleu": "causal_lm",
    "rouge_l": "causal_lm",
}
"""Every metric, with the task that it measures."""

_DEFAULTS: dict[Task, tuple[str, ...]] = {
    "classification": ("accuracy",),
    "regression": ("pearson", "spearmanr", "mse"),
    "causal_lm": ("loss", "perplexity", "token_accuracy"),
}
_LOWER_IS_BETTER = ("mse", "loss", "perplexity")


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
    return name.removeprefix("eval_") not in _LOWER_IS_BETTER


def diverged(what: str) -> ValueError:
    """Return the error for values that are not finite, with what can be done about it."""
    return ValueError(
        f"{what}: training diverged. Lower base_training.args.learning_rate, or use "
        "model.precision: float32."
    )


def metric_key(name: str) -> str:
    """Return a metric's name in records, where the loss is transformers' `eval_loss`."""
    return "eval_loss" if name == "loss" else name
