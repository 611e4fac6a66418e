"""What goes wrong around a sweep; docs/faults.md lists it with what happens then."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.trainer_utils import rotate_checkpoints

from fish_tuning import FishMask, fish_model
from fish_tuning.experiments.arms import planned
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.report.write import write_report
from fish_tuning.experiments.results import RUN_FILE, read_results
from fish_tuning.experiments.runs import record, training
from fish_tuning.experiments.runs.checkpoints import DatedByStep, newest_complete
from fish_tuning.experiments.runs.executors import local
from fish_tuning.experiments.runs.sweep import run_experiment
from tests.experiments.runs.records import FEW_ARMS, comparable, weights
from tests.experiments.tiny_experiment import experiment
from tests.fuzz.readers import altered, damaged

ONE_ARM = {"fish_tuning": {"methods_to_run": ["LoRA-FISH"]}}


# Killed at a chosen moment


def _kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def _killed_in_renaming(name):
    genuine = os.replace

    def replace(source, target):
        if Path(target).name == name:
            _kill()
        genuine(source, target)

    os.replace = replace


def _killed_at_step(step):
    genuine = training.run_arm

    def run_arm(arm, task, folder, report):
        def reporting(done, *rest):
            if done == step:
                _kill()
            report(done, *rest)

        return genuine(arm, task, folder, reporting)

    training.run_arm = run_arm


def _killed_after_scoring():
    genuine = fish_model.calculate_fisher_information

    def score(*args, **kwargs):
        genuine(*args, **kwargs)
        _kill()

    fish_model.calculate_fisher_information = score


def _killed_in_saving_the_adapter():
    from peft import PeftModel

    genuine = PeftModel.save_pretrained

    def save(self, folder, *args, **kwargs):
        genuine(self, folder, *args, **kwargs)
        if Path(folder).name == "adapter":
            file = Path(folder) / "adapter_model.safetensors"
            file.write_bytes(file.read_bytes()[:-100])
            _kill()

    PeftModel.save_pretrained = save


MOMENTS = {
    "scoring": _killed_after_scoring,
    "saving the mask's bits": lambda: _killed_in_renaming("fish_mask.safetensors"),
    "saving the mask": lambda: _killed_in_renaming("fish_mask.json"),
    "saving the selection": lambda: _killed_in_renaming("selection.json"),
    "training": lambda: _killed_at_step(6),
    "saving the adapter": _killed_in_saving_the_adapter,
    "recording the run": lambda: _killed_in_renaming(RUN_FILE),
    "recording the sweep": lambda: _killed_in_renaming("results.json"),
    "reporting": lambda: _killed_in_renaming("report.html"),
}


def _sweep_and_report(folder, config, moment):
    os.chdir(folder)
    if moment is not None:
        MOMENTS[moment]()
    write_report([run_experiment(config, name="e")], Path("out"))


@pytest.fixture(scope="module")
def kill_config(files):
    fish = {"methods_to_run": ["LoRA-FISH"], "scoring_point": "start"}
    return experiment(*files, "out", lora={"dropout": 0.1}, fish_tuning=fish)


@pytest.fixture(scope="module")
def undisturbed(kill_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    before = Path.cwd()
    try:
        _sweep_and_report(folder, kill_config, None)
    finally:
        os.chdir(before)
    return folder / "out"


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at(moment, kill_config, undisturbed, tmp_path, monkeypatch):
    """Guards each step of a sweep: called again, it ends as if nothing had happened."""
    monkeypatch.chdir(tmp_path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_sweep_and_report, args=(tmp_path, kill_config, moment))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    _sweep_and_report(tmp_path, kill_config, None)
    assert comparable(tmp_path / "out") == comparable(undisturbed)
    (run,) = read_results(tmp_path / "out").runs
    one, two = (weights(folder, run) for folder in (undisturbed, tmp_path / "out"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    whole = {path.name for path in undisturbed.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} >= whole


def test_killed_while_reporting(undisturbed, tmp_path, monkeypatch):
    """Guards an earlier report against a new one that is cut short."""
    folder = tmp_path / "out"
    shutil.copytree(undisturbed, folder)
    before = {path.name: path.read_bytes() for path in folder.glob("report.*")}

    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_report([read_results(folder)], folder)
    assert {path.name: path.read_bytes() for path in folder.glob("report.*")} == before
    monkeypatch.undo()
    write_report([read_results(folder)], folder)
    assert {path.name: path.read_bytes() for path in folder.glob("report.*")} == before


# The disk


@pytest.mark.parametrize(
    ("name", "at"), [("fish_mask.safetensors", 1), ("result.json", 2), ("results.json", 2)]
)
def test_disk_full_in_a_sweep(files, tmp_path, monkeypatch, name, at):
    """Guards what is finished, and the next attempt, against half a file."""
    config = experiment(*files, tmp_path, **FEW_ARMS)
    genuine, written = Path.write_bytes, []

    def write_bytes(path, content):
        written.extend([path] * (name in path.name))
        if name in path.name and len(written) == at:
            genuine(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return genuine(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    if name == "fish_mask.safetensors":
        results = run_experiment(config, name="e")
        assert [run.status for run in results.runs] == ["finished", "failed"]
        assert "No space left on device" in results.runs[1].error
    else:
        with pytest.raises(OSError, match="No space left on device"):
            run_experiment(config, name="e")
        assert [run.status for run in read_results(tmp_path).runs] == ["finished"]
    assert not list(tmp_path.rglob("*.tmp"))
    assert [r.status for r in run_experiment(config, name="e").runs] == ["finished"] * 2


def _limited_sweep(folder, config):
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, resource.RLIM_INFINITY))
    run_experiment(config, name="e")


@pytest.mark.slow
def test_files_that_the_system_cuts(files, tmp_path):
    """Guards the same where the checkpoint's writers meet a limit that the system sets."""
    config = experiment(*files, "out", **ONE_ARM)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_limited_sweep, args=(tmp_path, config))
    process.start()
    process.join()
    (run,) = read_results(tmp_path / "out").runs
    assert run.status == "failed" and run.error
    process = context.Process(target=_sweep_and_report, args=(tmp_path, config, None))
    process.start()
    process.join()
    (run,) = read_results(tmp_path / "out").runs
    assert run.status == "finished"


# Damaged and hostile checkpoints


@pytest.fixture(scope="module")
def checkpoints(files, tmp_path_factory):
    """Two checkpoints of a masked run that was interrupted."""
    folder = tmp_path_factory.mktemp("interrupted")
    config = experiment(*files, folder, **ONE_ARM)
    genuine = training.run_arm

    def run_arm(arm, task, folder, report):
        def reporting(step, *rest):
            if step == 10:
                raise KeyboardInterrupt

        return genuine(arm, task, folder, reporting)

    training.run_arm = run_arm
    try:
        with pytest.raises(KeyboardInterrupt):
            run_experiment(config, name="e")
    finally:
        training.run_arm = genuine
    return folder / "runs" / planned(config)[0].run_id / "checkpoints"


CHECKED = ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
CHECKED += ["adapter_model.safetensors", "fish_mask.json", "fish_mask.safetensors"]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_checkpoints(checkpoints, tmp_path_factory, data):
    """Guards against a traceback, where the checkpoint before would do."""
    folder = tmp_path_factory.mktemp("damaged") / "checkpoints"
    shutil.copytree(checkpoints, folder)
    file = folder / "checkpoint-8" / data.draw(st.sampled_from(CHECKED))
    content = file.read_bytes()
    if file.name == "trainer_state.json" and data.draw(st.booleans()):
        new = json.dumps(data.draw(altered(json.loads(content)))).encode()
    else:
        new = data.draw(damaged(content))
    file.write_bytes(new)
    found = newest_complete(folder, masked=True)
    assert found in (folder / "checkpoint-8", folder / "checkpoint-4")
    # What a cut leaves is never whole.
    if len(new) < len(content) and content.startswith(new) and file.suffix != ".json":
        assert found == folder / "checkpoint-4"
    shutil.rmtree(folder.parent)


@pytest.mark.parametrize(
    "state", [b"[]", b"null", b'{"global_step": [], "max_steps": 1}', b"[" * 100_000]
)
def test_states_of_another_shape(checkpoints, tmp_path, state):
    """Guards the same against JSON that is sound and something else."""
    shutil.copytree(checkpoints, tmp_path / "checkpoints")
    (tmp_path / "checkpoints/checkpoint-8/trainer_state.json").write_bytes(state)
    found = newest_complete(tmp_path / "checkpoints", masked=True)
    assert found == tmp_path / "checkpoints/checkpoint-4"
    assert not (tmp_path / "checkpoints/checkpoint-8").exists()


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_in_a_checkpoint_runs_nothing(files, checkpoints, tmp_path):
    """Guards a resumed sweep: the run fails and says why, and starts again the next time."""
    shutil.copytree(checkpoints.parents[2], tmp_path / "out")
    canary = tmp_path / "canary"
    for file in (tmp_path / "out").rglob("optimizer.pt"):
        torch.save(Canary(canary), file)
    config = experiment(*files, tmp_path / "out", **ONE_ARM)
    (run,) = run_experiment(config, name="e").runs
    assert run.status == "failed" and "UnpicklingError" in run.error
    (run,) = run_experiment(config, name="e").runs
    assert run.status == "finished" and not canary.exists()


def test_a_mask_of_another_run(files, checkpoints, tmp_path):
    """Guards against resuming under a mask that the checkpoint was not trained with."""
    shutil.copytree(checkpoints.parents[2], tmp_path / "out")
    (selection,) = (tmp_path / "out").rglob("selection")
    mask = FishMask.from_pretrained(selection)
    other = {name: bits.flatten().roll(1).view(bits.shape) for name, bits in mask.items()}
    FishMask(other, provenance=mask.provenance).save_pretrained(selection)
    config = experiment(*files, tmp_path / "out", **ONE_ARM)
    (run,) = run_experiment(config, name="e").runs
    assert run.status == "failed" and "was trained with another mask" in run.error
    (run,) = run_experiment(config, name="e").runs
    assert run.status == "finished"


# Training that diverges


def test_a_training_that_diverges(files, tmp_path):
    """Guards the other runs, and the table, against one whose numbers are not finite."""
    config = experiment(
        *files, tmp_path, training={"args_override": {"learning_rate": 1e30}}, **FEW_ARMS
    )
    results = run_experiment(config, name="e")
    for run in results.runs:
        assert run.status == "failed"
        assert "predictions are not finite: training diverged" in run.error
    paths = write_report([read_results(tmp_path)], tmp_path)
    assert all(path.stat().st_size for path in paths)


# Folders, links, the clock


def _hold(folder, config, holding):
    def wait(*args):
        holding.set()
        time.sleep(60)

    local.carry_out = wait
    os.chdir(folder)
    run_experiment(config, name="e")


@pytest.mark.slow
def test_two_sweeps_in_one_folder(files, tmp_path):
    """Guards two processes against writing over each other, also under two names of one folder;
    and the next sweep against a lock whose holder was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    holding = context.Event()
    config = experiment(*files, "out", **ONE_ARM)
    process = context.Process(target=_hold, args=(tmp_path, config, holding))
    process.start()
    assert holding.wait(60)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for name in ("out", "link", "link/../out"):
        with pytest.raises(ConfigError, match="another process is running an experiment"):
            run_experiment(experiment(*files, tmp_path / name, **ONE_ARM), name="e")
    process.kill()
    process.join()
    (run,) = run_experiment(experiment(*files, tmp_path / "link", **ONE_ARM), name="e").runs
    assert run.status == "finished"
    assert read_results(tmp_path / "out").runs == [run]


def test_what_a_link_leads_to_stays(tmp_path):
    """Guards folders of the user's that are linked into a run's folder."""
    precious = tmp_path / "elsewhere" / "checkpoint-4" / "precious"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "elsewhere")
    record.discard_temporary(tmp_path / "run")
    assert precious.read_text() == "mine"
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "checkpoint-4").symlink_to(precious.parent)
    assert newest_complete(tmp_path / "own", masked=False) is None
    assert precious.read_text() == "mine"


def test_paths_in_results_are_only_shown(undisturbed, tmp_path):
    """Guards files that a results.json names: reports read none and write none there."""
    outside = tmp_path / "outside"
    outside.write_text("mine")
    results = read_results(undisturbed)
    run = results.runs[0].model_copy(
        update={"run_id": "../../outside", "adapter": "../outside", "arm": "/etc/passwd"}
    )
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    paths = write_report([results.model_copy(update={"runs": [run]})], folder)
    assert {path.parent for path in paths} == {folder}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "outside"]
    assert outside.read_text() == "mine"


def test_checkpoints_when_the_clock_is_put_back(tmp_path):
    """Guards the newest checkpoint, which Trainer would take for the oldest and delete."""
    args = type("Args", (), {"output_dir": str(tmp_path)})
    for step, hours in ((4, 2), (8, 0), (12, -2)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        now = time.time() + 3600 * hours
        os.utime(folder, (now, now))
        rotate_checkpoints(str(tmp_path), save_total_limit=2, use_mtime=True)
        state = type("State", (), {"global_step": step})
        DatedByStep().on_save(args, state, None)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-8", "checkpoint-12"}


def test_a_sweep_whose_clock_is_put_back(files, undisturbed, tmp_path, monkeypatch):
    """Guards seconds and order against the time of day, which goes back all the time here."""
    genuine, called = time.time, [0]

    def back():
        called[0] += 1
        return genuine() - 60 * called[0]

    monkeypatch.setattr(time, "time", back)
    config = experiment(*files, tmp_path, **FEW_ARMS)
    results = run_experiment(config, name="e")
    assert called[0] > 10
    assert [run.run_id for run in results.runs] == [arm.run_id for arm in planned(config)]
    for run in results.runs:
        assert run.status == "finished", run.error
        assert 0 < run.train_seconds < 100 and 0 <= run.score_seconds < 100
        assert [point["step"] for point in run.curve] == [4, 8, 12]
