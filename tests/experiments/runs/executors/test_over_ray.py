"""Sweeps whose runs are spread over Ray, on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fish_tuning.experiments.arms import planned
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.results import RESULTS_FILE
from fish_tuning.experiments.runs.sweep import run_experiment
from tests.experiments.runs.records import comparable
from tests.experiments.tiny_experiment import experiment

pytest.importorskip("ray", reason="pip install 'fish-tuning[ray]'")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
ARMS = {"fish_tuning": {"methods_to_run": ["Original LoRA", "LoRA-FISH"]}}
KEYS = [("Original LoRA", None), ("LoRA-FISH", 1.0)]
SEARCH: dict[str, Any] = {"values": [1e-3, 1e-2], "held_out": 24, "seeds": [7]}


@pytest.fixture
def one_thread():
    """As each run of Ray has: sums of more threads are rounded otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(run):
    return load_file(Path("out") / run.adapter / "adapter_model.safetensors")


def test_the_same_results_as_one_after_the_other(files, tmp_path, monkeypatch, one_thread):
    """Guards records, their order and weights, the choice of learning rates between two stages,
    relative paths, and what is recorded of a run that fails."""
    results, trained = [], []
    for name, cpus in (("one", None), ("two", 1)):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        config = experiment(*files, "out", **ARMS, seeds=[1, 2], learning_rate_search=SEARCH)
        # The last run fails, whichever learning rate is chosen: there is a file in its place.
        for rate in SEARCH["values"]:
            folder = Path("out/runs") / planned(config, dict.fromkeys(KEYS, rate))[-1].run_id
            folder.mkdir(parents=True)
            (folder / "adapter").touch()
        results.append(run_experiment(config, name="e", ray_cpus=cpus))
        trained.append([weights(run) for run in results[-1].runs if run.status == "finished"])
    assert comparable(tmp_path / "one/out") == comparable(tmp_path / "two/out")
    assert [run.status for run in results[1].runs] == ["finished"] * 3 + ["failed"]
    assert len(results[1].search) == 4
    for one, two in zip(*trained, strict=True):
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    left = {path.name for path in (Path("out") / results[1].runs[0].adapter).parent.iterdir()}
    assert left == {"adapter", "result.json"}
    (Path("out/runs") / results[1].runs[3].run_id / "adapter").unlink()
    again = run_experiment(config, name="e", ray_cpus=1)
    assert again.runs[:3] == results[1].runs[:3] and again.runs[3].status == "finished"


def dies(arm, *args):
    os._exit(1)


def test_a_process_that_is_lost(files, tmp_path, monkeypatch):
    """Guards the other runs, and the record, against one whose process is killed."""
    from fish_tuning.experiments.runs.executors import over_ray

    monkeypatch.setattr(over_ray, "_carry_out", dies)
    config = experiment(*files, tmp_path, **ARMS)
    with pytest.raises(ConfigError, match=r"cpus_per_run: 4096 is more than the \d+ cores"):
        run_experiment(config, name="e", ray_cpus=4096)
    assert not (tmp_path / "runs").exists()
    runs = run_experiment(config, name="e", ray_cpus=1).runs
    assert [run.status for run in runs] == ["failed", "failed"]
    assert all("died" in run.error for run in runs)
    monkeypatch.undo()
    runs = run_experiment(config, name="e", ray_cpus=1).runs
    assert [run.status for run in runs] == ["finished", "finished"]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_sweep_goes_on(stop, files, tmp_path, one_thread):
    """Guards against runs that go on when their sweep has ended, and a sweep that does not."""
    folder = tmp_path / "out"
    config = experiment(*files, folder, **ARMS, seeds=[1, 2, 3])
    file = tmp_path / "tiny.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)))
    words = [sys.executable, "-m", "fish_tuning.cli", "run", file, "--ray", "--cpus-per-run", "1"]
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    process = subprocess.Popen(
        words,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (folder / RESULTS_FILE).exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(stop)
    said = process.communicate()[1]
    if stop == signal.SIGINT:
        assert process.returncode == 130
        assert said.endswith(f"fish-tuning run {file} --ray --cpus-per-run 1\n")
    else:
        time.sleep(10)  # Ray notices that its driver is gone.
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    time.sleep(5)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    results = run_experiment(config, name="tiny", ray_cpus=1)
    alone = run_experiment(
        experiment(*files, tmp_path / "alone", **ARMS, seeds=[1, 2, 3]), name="e"
    )
    assert [run.metrics for run in results.runs] == [run.metrics for run in alone.runs]
    assert [run.curve for run in results.runs] == [run.curve for run in alone.runs]
