"""Experiment trackers: one tracked run per run of a sweep."""

import os
import sys
from types import SimpleNamespace

import pytest

from fish_tuning.experiments.arms import planned
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.runs.record import CHECKPOINTS_FOLDER
from fish_tuning.experiments.runs.sweep import run_experiment
from fish_tuning.experiments.runs.tracking.trackers import tracked
from tests.experiments.runs.records import FEW_ARMS
from tests.experiments.sweep_sample import make_run
from tests.experiments.tiny_experiment import experiment


def tracking(tmp_path, tracker, **settings):
    """An arm, its experiment and the folder of its run."""
    args = {"report_to": tracker, **settings}
    config = experiment(tmp_path, tmp_path, tmp_path, training={"args_override": args})
    arm = planned(config)[1]
    return arm, SimpleNamespace(config=config, name="mine"), tmp_path / "runs" / arm.run_id


def test_tensorboard_keeps_its_logs(files, tmp_path):
    """Guards logs that end with the checkpoints, and runs that share a folder."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = experiment(
        *files, tmp_path, training={"args_override": {"report_to": "tensorboard"}}, **FEW_ARMS
    )
    results = run_experiment(config, name="mine")
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ
    folders = sorted(path.name for path in (tmp_path / "tensorboard" / "mine").iterdir())
    assert folders == sorted(run.run_id for run in results.runs)
    run = results.runs[1]
    logs = EventAccumulator(str(tmp_path / "tensorboard" / "mine" / run.run_id)).Reload()
    found = {tag: logs.Scalars(tag) for tag in logs.Tags()["scalars"]}
    assert len(found["train/loss"]) >= len(run.train_curve) > 0
    assert found["final/accuracy"][0].value == pytest.approx(run.metrics["accuracy"])
    assert found["mask/all/selected"][0].value == run.trainable_params


class FakeWandb(SimpleNamespace):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__(opened=[], ended=[], summary={})

    def init(self, **arguments):
        self.opened.append(arguments)
        return SimpleNamespace(
            id="abc",
            summary=self.summary,
            finish=lambda exit_code: self.ended.append(exit_code),
        )


def test_wandb_has_a_run_of_its_own(tmp_path, monkeypatch):
    """Guards the name and the group, and that the next run does not go on in this one."""
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    arm, of, folder = tracking(tmp_path, "wandb")
    with tracked(arm, of, folder) as summarize:
        summarize(make_run("LoRA-FISH", 1, 1.0))
    [opened] = wandb.opened
    assert opened["name"] == "LoRA-FISH 1, seed 1" and opened["group"] == "mine"
    assert opened["project"] == "fish-tuning" and opened["id"] is None
    assert wandb.ended == [0] and wandb.summary["mask/all/selected"] > 0
    assert list(folder.iterdir()) == []


def test_wandb_goes_on_after_an_interruption(tmp_path, monkeypatch):
    """Guards against a second tracked run for a run that was interrupted, and one left open."""
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    arm, of, folder = tracking(tmp_path, "wandb", project="other")
    with pytest.raises(KeyboardInterrupt), tracked(arm, of, folder):
        raise KeyboardInterrupt
    with tracked(arm, of, folder):
        pass
    assert wandb.ended == [1, 0]
    first, second = wandb.opened
    assert first["id"] is None and second["id"] == "abc" and second["resume"] == "allow"
    assert first["project"] == "other"


def test_a_tracker_that_cannot_be_opened_ends_the_sweep(files, tmp_path, monkeypatch):
    """Guards against a sweep whose runs all fail, one after the other, for the same reason."""

    def refuse(**arguments):
        raise RuntimeError("no API key configured\nand more")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse, __spec__=object()))
    config = experiment(
        *files, tmp_path, training={"args_override": {"report_to": "wandb"}}, **FEW_ARMS
    )
    with pytest.raises(ConfigError, match=r"report_to: wandb cannot be opened \(.*no API key"):
        run_experiment(config, name="mine")
    assert not (tmp_path / "results.json").exists()


def test_a_summary_that_fails_costs_no_run(tmp_path, monkeypatch, caplog):
    """Guards hours of training against a tracker that is gone at their end."""
    wandb = FakeWandb()
    wandb.summary = SimpleNamespace(update=lambda numbers: 1 / 0)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with tracked(*tracking(tmp_path, "wandb")) as summarize:
        summarize(make_run("LoRA-FISH", 1, 1.0, run_id="mine"))
    assert "no summary of mine was tracked: division by zero" in caplog.text
    assert wandb.ended == [0]


class FakeTrackio(SimpleNamespace):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__(opened=[], logged=[], config={}, run=None)
        self.context_vars = SimpleNamespace(current_run=SimpleNamespace(get=lambda: self.run))
        self.init = self._init
        self.log = self.logged.append

    def _init(self, **arguments):
        self.opened.append(arguments)
        self.run = arguments

    def finish(self):
        self.run = None


def test_trackio_has_a_run_of_its_own(tmp_path, monkeypatch):
    """Guards the group, and logs that would go on in an older run of the same name."""
    trackio = FakeTrackio()
    original = trackio.init
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    arm, of, folder = tracking(tmp_path, "trackio")
    with tracked(arm, of, folder) as summarize:
        # As transformers' callback does: before training, and again for the last evaluation.
        trackio.init(project="fish-tuning", name=arm.title, resume="allow")
        trackio.finish()
        summarize(make_run("LoRA-FISH", 1, 1.0))
    assert [opened["group"] for opened in trackio.opened] == ["mine", "mine"]
    assert [opened["resume"] for opened in trackio.opened] == ["never", "allow"]
    assert trackio.logged[0]["mask/all/selected"] > 0
    assert trackio.run is None and trackio.init == original
    (folder / CHECKPOINTS_FOLDER).mkdir(parents=True)
    with tracked(arm, of, folder):
        trackio.init(project="fish-tuning", name=arm.title)
    assert trackio.opened[-1]["resume"] == "allow"


def test_no_tracker(tmp_path):
    """Guards sweeps that want none."""
    arm, of, folder = tracking(tmp_path, "none")
    with tracked(arm, of, folder) as summarize:
        summarize(make_run("LoRA-FISH", 1, 1.0))
    assert not folder.exists()
