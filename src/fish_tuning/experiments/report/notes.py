"""What a reader has to know about a sweep's numbers."""

from __future__ import annotations

from fish_tuning.experiments.metrics.names import greater_is_better
from fish_tuning.experiments.report.comparison import Comparison
from fish_tuning.experiments.report.statistics import RESAMPLES
from fish_tuning.experiments.report.summary_table import metric_title


def notes_on(comparison: Comparison) -> list[str]:
    """Explain the columns of a comparison that need it."""
    notes = [
        "Mean ± sample standard deviation over seeds. Train Time: wall-clock time of training, "
        "without evaluation, saving and scoring. Final Trainable Params: scalars that the "
        "optimizer held, including the head."
    ]
    if any(arm.learning_rates for arm in comparison.arms):
        notes.append(
            "Learning Rate: chosen per method and budget on held-out training examples, before the "
            "runs of this table."
        )
    runs = [run for group in comparison.groups for run in group.runs]
    places = sorted({run.peak_memory_of for run in runs if run.peak_memory_of})
    if places:
        notes.append(
            f"Peak Memory: highest value during training, measured on: {', '.join(places)}."
        )
    metric = comparison.metric
    if metric is not None and not greater_is_better(metric):
        notes.append(f"{metric_title(metric)}: lower is better.")
    if any(arm.before for arm in comparison.arms):
        notes.append(
            "Loss: mean negative log-likelihood per token, in nats, over all tokens that count; "
            "perplexity: its exponential. An arrow leads from the model before training to the "
            "model after it. Forgetting: how much the loss on a further evaluation set has grown."
        )
    if len(comparison.arms) > 1 and any(arm.is_baseline for arm in comparison.arms):
        notes.append(
            f"Difference: mean of the paired differences over the seeds that both have, with a 95% "
            f"percentile bootstrap interval ({RESAMPLES:,} resamples of the seeds, within each "
            "experiment if there are several). With few seeds the interval is too narrow."
        )
    return notes
