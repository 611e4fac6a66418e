"""Notes on a sweep's numbers."""

from fish_tuning.experiments.report.comparison import compare
from fish_tuning.experiments.report.notes import notes_on
from tests.experiments.sweep_sample import make_sweep


def test_lower_is_better_is_said():
    """Guards against a reader who takes the largest error for the best arm."""
    sweep = make_sweep()
    runs = [
        r.model_copy(update={"main_metric": "mse", "metrics": {"mse": 0.5}}) for r in sweep.runs
    ]
    notes = notes_on(compare(sweep.model_copy(update={"runs": runs})))
    assert "MSE: lower is better." in notes
    assert not any("lower" in note for note in notes_on(compare(sweep)))
