"""Progress without a terminal: lines with the time left."""

from types import SimpleNamespace

from fish_tuning.experiments.arms import Arm
from fish_tuning.experiments.runs import console

ARM = Arm("Original LoRA", None, 1, "digest")


def test_the_time_left_is_shown(monkeypatch, capsys):
    """Guards a long run in a log file, which would be silent until it ends."""
    clock = iter([0.0, 0.0, 10.0, 20.0, 50.0, 60.0, 240.0])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.ProgressLines() as lines:
        lines.expect(3, 2)
        report = lines.begin(ARM)
        for step in (1, 2, 5, 6):
            report(step, 9, 2.5)
        run = SimpleNamespace(status="finished", main_metric="loss", metrics={"loss": 1.5})
        lines.end(ARM, run)
    assert capsys.readouterr().err.splitlines() == [
        "2 of 5 runs are finished already",
        "Original LoRA, seed 1: step 5 of 9, loss 2.5000, 40 s left",
        "Original LoRA, seed 1: loss 1.5000 (2 more runs, about 8 min left)",
    ]
