"""Generative sweeps that are killed, spread over processes or over Ray."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from fish_tuning.experiments.results import read_results
from fish_tuning.experiments.runs import training
from fish_tuning.experiments.runs.generative import evaluation, generation
from fish_tuning.experiments.runs.sweep import run_experiment
from tests.experiments.runs.records import TIMES, comparable, weights
from tests.experiments.tiny_language_model import generative, language_model, write_pairs
from tests.processes import in_processes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two arms that train for six steps, generate and are evaluated on a further set.

    The steps are less than an epoch: two processes fill up an incomplete last batch.
    """
    folder = tmp_path_factory.mktemp("files")
    data = write_pairs(folder / "pairs.jsonl")
    (folder / "other.txt").write_text("w1 w2 w3 <end>\nw4 w5 <end>\n" * 9, encoding="utf-8")
    return generative(
        language_model(folder / "model"),
        data,
        "out",
        training={"args_override": {"max_steps": 6, "eval_steps": 3, "save_steps": 3}},
        fish_tuning={"methods_to_run": ["Original LoRA", "LoRA-FISH"]},
        generation={"metrics": ["bleu", "rouge_l"], "max_new_tokens": 6, "batch_size": 2},
        evaluation_sets={"other": {"path": str(folder / "other.txt")}},
    )


def _kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def _killed_at_call(module, name, number):
    genuine, calls = getattr(module, name), []

    def counted(*args, **kwargs):
        calls.append(None)
        if len(calls) == number:
            _kill()
        return genuine(*args, **kwargs)

    setattr(module, name, counted)


def _killed_at_step(step):
    genuine = training.run_arm

    def run_arm(arm, task, folder, report):
        return genuine(arm, task, folder, lambda done, *_: _kill() if done == step else None)

    training.run_arm = run_arm


MOMENTS = {
    "before training": lambda: _killed_at_call(evaluation, "evaluate_all", 1),
    "training": lambda: _killed_at_step(5),
    "generating": lambda: _killed_at_call(generation, "_generate_batch", 3),
    "generating in the second run": lambda: _killed_at_call(generation, "_generate_batch", 6),
    "keeping the texts": lambda: _killed_at_call(evaluation, "write_generations", 1),
    "measuring the texts": lambda: _killed_at_call(evaluation, "text_metrics", 1),
}


def _sweep(folder, config, moment):
    os.chdir(folder)
    torch.set_num_threads(1)
    if moment in MOMENTS:
        MOMENTS[moment]()
    run_experiment(config, name="e")


def _started(folder, config, moment):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_sweep, args=(folder, config, moment))
    process.start()
    return process


def texts(folder):
    """The texts that all runs keep."""
    return {file.parent.name: file.read_text() for file in folder.glob("runs/*/generations.jsonl")}


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    """The folder of a sweep that nothing happened to, and how long it took."""
    folder = tmp_path_factory.mktemp("undisturbed")
    began = time.monotonic()
    process = _started(folder, config, None)
    process.join()
    assert process.exitcode == 0
    return folder / "out", time.monotonic() - began


def assert_same(folder, expected):
    assert comparable(folder) == comparable(expected)
    assert texts(folder) == texts(expected) and len(texts(folder)) == 2
    for run in read_results(folder).runs:
        one, two = weights(folder, run), weights(expected, run)
        assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at(moment, config, undisturbed, tmp_path):
    """Guards each step of a generative run: called again, it ends as if nothing had happened."""
    process = _started(tmp_path, config, moment)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    process = _started(tmp_path, config, None)
    process.join()
    assert process.exitcode == 0
    assert_same(tmp_path / "out", undisturbed[0])


def test_killed_again_and_again(config, undisturbed, tmp_path):
    """Guards against the moment that nobody has thought of."""
    expected, seconds = undisturbed
    draw = random.Random(time.time_ns())
    for _ in range(4):
        process = _started(tmp_path, config, None)
        process.join(draw.uniform(0.1, seconds))
        process.kill()
        process.join()
    process = _started(tmp_path, config, None)
    process.join()
    assert process.exitcode == 0
    assert_same(tmp_path / "out", expected)


def _in_one_of_two(rank, config, folder):
    os.chdir(folder)
    return run_experiment(config, name="e")


def test_two_processes_train_and_generate_as_one(config, undisturbed, tmp_path):
    """Guards texts divided between processes, and sums over examples that are repeated."""
    args = {**config.training.args_override, "per_device_train_batch_size": 4, "use_cpu": True}
    section = config.training.model_copy(update={"args_override": args})
    doubled = config.model_copy(update={"training": section})
    results, _ = in_processes(2, tmp_path / "meeting", _in_one_of_two, doubled, tmp_path)
    expected = read_results(undisturbed[0])
    for run, other in zip(results.runs, expected.runs, strict=True):
        assert run.status == "finished", run.error
        assert run.metrics_before == pytest.approx(other.metrics_before, rel=1e-5)
        for name in ("eval_loss", "perplexity", "other_loss"):
            assert run.metrics[name] == pytest.approx(other.metrics[name], rel=1e-4)
    for run in results.runs:
        rows = (tmp_path / "out/runs" / run.run_id / "generations.jsonl").read_text().splitlines()
        prompts = [json.loads(row)["prompt"] for row in rows]
        assert len(prompts) == len(set(prompts)) > 2


def test_ray_gives_the_same_results(config, undisturbed, tmp_path, monkeypatch):
    """Guards examples, prompts and texts on their way to another process."""
    pytest.importorskip("ray", reason="pip install 'fish-tuning[ray]'")
    monkeypatch.chdir(tmp_path)
    run_experiment(config, name="e", ray_cpus=1)
    assert TIMES and comparable(Path("out")) == comparable(undisturbed[0])
    assert texts(Path("out")) == texts(undisturbed[0])
