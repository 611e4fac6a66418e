"""What a reader has to know about a sweep's numbers."""

from __future__ import annotations

from fish_tuning.experiments.metrics import KNOWN_METRICS, greater_is_better
from fish_tuning.experiments.report.columns import metric_title
from fish_tuning.experiments.report.comparison import Comparison
from fish_tuning.experiments.report.statistics import RESAMPLES


def notes_on(comparison: Comparison) -> list[str]:
    """Explain the columns of a comparison that need it."""
    notes = [
        "Mean ± sample standard deviation over seeds. Train Time: wall clock of training, without "
        "evaluation, saving and scoring. Final Trainable Params: scalars that the optimizer held, "
        "head included."
    ]
    if any(arm.learning_rates for arm in comparison.arms):
        notes.append(
            "Learning Rate: chosen for each method and budget on examples held out of the "
            "training data, before the runs of this table."
        )
    runs = [run for group in comparison.groups for run in group.runs]
    places = sorted({run.peak_memory_of for run in runs if run.peak_memory_of})
    if places:
        notes.append(f"Peak Memory: highest during training, of: {', '.join(places)}.")
    metric = comparison.metric
    if metric in KNOWN_METRICS and not greater_is_better(metric):
        notes.append(f"{metric_title(metric)}: lower is better.")
    if len(comparison.arms) > 1 and any(arm.is_baseline for arm in comparison.arms):
        notes.append(
            f"Difference: mean over the seeds that both have, seed by seed, with a 95% percentile "
            f"bootstrap interval ({RESAMPLES:,} resamples of the seeds, within each experiment "
            "where there are several). With few seeds the interval is too narrow."
        )
    return notes
