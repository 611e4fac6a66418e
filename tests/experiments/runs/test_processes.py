"""Sweeps that several processes train together."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch.multiprocessing import ProcessRaisedException
from torch.testing import assert_close
from transformers import TrainerCallback

from fish_tuning import FishMask
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.results import RESULTS_FILE, read_results
from fish_tuning.experiments.runs import processes, training
from fish_tuning.experiments.runs.checkpoints import newest_complete
from fish_tuning.experiments.runs.measurements import CountError
from fish_tuning.experiments.runs.sweep import run_experiment
from tests.experiments.tiny_experiment import experiment, write_bert, write_data
from tests.processes import in_processes

ROOT = Path(__file__).parents[3]
BATCH = 8


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return write_bert(folder / "model", **rates), write_data(folder / "data.csv")


def config_for(count, files, folder, **fish):
    """An experiment whose steps take the same examples in any number of processes."""
    args = {"per_device_train_batch_size": BATCH // count, "use_cpu": True}
    # The 12 examples of validation in equal parts: none is repeated to fill up a batch.
    args["per_device_eval_batch_size"] = 6
    return experiment(
        *files,
        folder,
        lora={"dropout": 0.0},
        training={"args_override": args},
        fish_tuning={"methods_to_run": ["Original LoRA", "LoRA-FISH"], **fish},
    )


def sweep(rank, config):
    return run_experiment(config, name="sweep")


def adapter_of(folder, run):
    return Path(folder) / run.adapter


def assert_same_runs(results, folder, expected, expected_folder):
    """Equal masks, and metrics, losses and weights to what rounding leaves."""
    assert [run.status for run in results.runs] == ["finished"] * len(expected.runs)
    for run, other in zip(results.runs, expected.runs, strict=True):
        assert set(json.loads(run.model_dump_json())) == set(json.loads(other.model_dump_json()))
        assert (run.trainable_params, run.changed_params) == (
            other.trainable_params,
            other.changed_params,
        )
        assert run.metrics == pytest.approx(other.metrics, abs=1e-5)
        for name in ("curve", "train_curve"):
            for point, reference in zip(getattr(run, name), getattr(other, name), strict=True):
                assert point == pytest.approx(reference, abs=1e-5)
        one, two = adapter_of(folder, run), adapter_of(expected_folder, other)
        if run.ratio is not None:
            assert FishMask.from_pretrained(one) == FishMask.from_pretrained(two)
        weights, reference = (load_file(f / "adapter_model.safetensors") for f in (one, two))
        assert weights.keys() == reference.keys()
        for name, tensor in weights.items():
            assert_close(tensor, reference[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("scoring_point", ["perturbed", "warmup"])
def test_two_processes_train_as_one_with_the_doubled_batch(scoring_point, files, tmp_path):
    """Guards losses scaled by the number of processes, divided scoring, files of two writers."""
    fish = {"scoring_point": scoring_point, "warmup_steps": 2}
    one, two = tmp_path / "one", tmp_path / "two"
    expected = run_experiment(config_for(1, files, one, **fish), name="sweep")
    config = config_for(2, files, two, **fish)
    by_rank = in_processes(2, tmp_path / "meeting", sweep, config)
    assert by_rank[0] == by_rank[1] == read_results(two)
    assert_same_runs(by_rank[0], two, expected, one)
    assert [run.hardware["processes"] for run in by_rank[0].runs] == [2, 2]
    for run in by_rank[0].runs:
        left = {path.name for path in adapter_of(two, run).parent.iterdir()}
        assert left == {"adapter", "result.json"}
    stamp = (two / RESULTS_FILE).read_bytes()
    assert in_processes(2, tmp_path / "again", sweep, config) == by_rank
    assert (two / RESULTS_FILE).read_bytes() == stamp
    with pytest.raises(ConfigError, match="number of processes: 2 trained the runs"):
        run_experiment(config, name="sweep")


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 10:
            raise KeyboardInterrupt


def interrupted_sweep(rank, config):
    """A sweep that stops in its first training and goes on."""
    whole: Any = training.build_trainer
    training.build_trainer = lambda *args: whole(*args[:-1], [*args[-1], Stop()])
    try:
        run_experiment(config, name="sweep")
    except KeyboardInterrupt:
        [checkpoints] = Path(config.training.output_dir).glob("runs/*/checkpoints")
        alone, together = (
            newest_complete(copied(checkpoints, f"{rank}-{count}"), masked=False, processes=count)
            for count in (1, 2)
        )
        assert alone is None and together.name == "checkpoint-8"
    training.build_trainer = whole
    processes.in_main(lambda: None)
    return run_experiment(config, name="sweep")


def copied(folder, name):
    return Path(shutil.copytree(folder, folder.parent.parent.parent / "copies" / name))


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on(files, tmp_path):
    """Guards checkpoints of several processes: whose random states, and who chooses one."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    [expected, _] = in_processes(2, tmp_path / "one", sweep, config_for(2, files, whole))
    config = config_for(2, files, resumed)
    [results, _] = in_processes(2, tmp_path / "two", interrupted_sweep, config)
    assert_same_runs(results, resumed, expected, whole)


def failing_sweep(rank, config, ranks):
    """A sweep whose first run fails in some of the processes, when training begins."""
    processes.PATIENCE = processes.timedelta(seconds=3)
    whole: Any = training.build_trainer

    def failing(*args):
        training.build_trainer = whole
        trainer = whole(*args)
        if rank in ranks:
            trainer.train = broken
        return trainer

    training.build_trainer = failing
    return run_experiment(config, name="sweep")


def broken(*args, **kwargs):
    raise CountError("it does not train what it should")


@pytest.mark.slow
def test_a_run_that_fails_everywhere_is_recorded(files, tmp_path):
    """Guards against a sweep that ends with the first run that fails."""
    config = config_for(2, files, tmp_path / "out")
    [results, other] = in_processes(2, tmp_path / "meeting", failing_sweep, config, [0, 1])
    assert results == other
    assert [run.status for run in results.runs] == ["failed", "finished"]
    assert results.runs[0].error == "CountError: it does not train what it should"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_run_that_fails_in_one_process_ends_all(rank, files, tmp_path):
    """Guards against processes that wait forever for one that has raised."""
    config = config_for(2, files, tmp_path / "out")
    with pytest.raises(ProcessRaisedException, match="it does not train what it should"):
        in_processes(2, tmp_path / "meeting", failing_sweep, config, [rank])
    assert not list((tmp_path / "out").glob("runs/*/result.json"))


def agreements(rank):
    """What all are told when nobody fails, when one does, and when process 0 alone acts."""
    fine = processes.agree_on(None)
    one = processes.agree_on(ValueError("no luck") if rank == 1 else None)
    value = processes.in_main(lambda: rank + 10)
    try:
        processes.in_main(broken)
    except CountError as error:
        return fine, f"{type(one).__name__}: {one}", value, str(error)


@pytest.mark.slow
def test_what_all_are_told(tmp_path):
    """Guards against processes that go on where one has failed."""
    [main, other] = in_processes(2, tmp_path / "meeting", agreements)
    assert main == (
        None,
        "RuntimeError: process 1 failed: ValueError: no luck",
        10,
        "it does not train what it should",
    )
    assert other == (None, "ValueError: no luck", *main[2:])


def command(*words, **variables):
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", *map(str, words)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["own", "torchrun", "accelerate"])
def test_commands_that_start_several(launcher, files, tmp_path):
    """Guards the ways to start it: one report, one table, the exit code of the runs."""
    config = config_for(2, files, tmp_path / "out", methods_to_run=["LoRA-FISH"])
    file = tmp_path / "tiny.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json", exclude_unset=True)))
    program = ["fish_tuning.cli", "run", file]
    words = {
        "own": [*program, "--num-processes", 2],
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", *program],
        "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2"],
    }[launcher]
    if launcher == "accelerate":
        words += ["--main_process_port=0", "-m", *program]
    done = command(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("LoRA-FISH") == 1
    assert done.stdout.count("report.html") == 1
    [run] = read_results(tmp_path / "out").runs
    assert run.status == "finished" and run.hardware["processes"] == 2
    if launcher == "own":
        # As many as were there before: one process alone is refused, by the command too.
        refused = command(*program)
        assert refused.returncode == 2
        assert "number of processes: 2 trained the runs" in refused.stderr
