"""Sweeps: what is trained, what is recorded, and what survives."""

import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from peft import AutoPeftModelForSequenceClassification

from fish_tuning import FishMask
from fish_tuning.experiments.arms import planned
from fish_tuning.experiments.config.lock import LOCK_FILE
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.models.counts import ParameterCounts
from fish_tuning.experiments.models.load import load_model, load_tokenizer
from fish_tuning.experiments.results import read_results
from fish_tuning.experiments.runs import prepare, training
from fish_tuning.experiments.runs.sweep import run_experiment
from tests.experiments.runs.records import FEW_ARMS, comparable, weights
from tests.experiments.tiny_experiment import ALL_ARMS, experiment, write_data, write_llama


@pytest.fixture(scope="module")
def sweep(files, tmp_path_factory):
    """Every kind of arm, two budgets."""
    folder = tmp_path_factory.mktemp("sweep") / "out"
    config = experiment(
        *files,
        folder,
        fish_tuning={"methods_to_run": ALL_ARMS, "budgets": [1.0, 0.5]},
        peers=[{"method": "IA3", "config": {"feedforward_modules": []}}],
    )
    return folder, config, run_experiment(config, name="sweep")


def test_every_arm_trains_exactly_its_budget(sweep):
    """Guards the published defect: arms that train other numbers than the table says."""
    _, config, results = sweep
    assert [run.run_id for run in results.runs] == [arm.run_id for arm in planned(config)]
    assert [run.status for run in results.runs] == ["finished"] * len(results.runs)
    found = {(run.arm, run.ratio): run.trainable_params for run in results.runs}
    # Two layers, q/k/v of 16 x 16 at rank 2: 6 pairs of 32 + 32, and a head of 16 * 2 + 2.
    baseline = 6 * 64 + 34
    assert found == {
        ("Original LoRA", None): baseline,
        ("LoRA-FISH", 1.0): baseline,
        ("LoRA-FISH-rand", 1.0): baseline,
        ("LoRA-FISH-rev", 1.0): baseline,
        ("LoRA (FISH rank)", None): 6 * 4 * 64 + 34,
        ("LoRA-FA", None): baseline,
        ("IA3", None): 6 * 16 + 34,
        ("LoRA-FISH", 0.5): baseline // 2,
        ("LoRA-FISH-rand", 0.5): baseline // 2,
        ("LoRA-FISH-rev", 0.5): baseline // 2,
    }
    for run in results.runs:
        assert run.budget == run.trainable_params >= run.changed_params > 0
        assert sum(tensor.selected for tensor in run.mask_density) in (0, run.budget)


def test_what_a_record_holds(sweep):
    """Guards the record: metrics at every evaluation, losses, sizes, times, where it ran."""
    folder, _, results = sweep
    assert read_results(folder) == results
    for run in results.runs:
        assert [point["step"] for point in run.curve] == [4, 8, 12]
        assert (
            set(run.metrics) == {"accuracy", "eval_loss"} == set(run.curve[0]) - {"step", "epoch"}
        )
        assert max(point["accuracy"] for point in run.curve) == run.metrics["accuracy"]
        assert {3, 6, 9, 12} <= {point["step"] for point in run.train_curve}
        assert run.train_seconds > 0 and run.peak_memory_bytes > 2**20
        assert (
            run.adapter_bytes == (folder / run.adapter / "adapter_model.safetensors").stat().st_size
        )
        assert run.total_params > run.trainable_params
        fisher = run.arm in ("LoRA-FISH", "LoRA-FISH-rev")
        kinds = {h.kind: sum(h.counts) + h.zeros for h in run.score_histograms}
        assert kinds == ({"lora_A": 768, "lora_B": 768, "other": 34} if fisher else {})
        assert (run.score_seconds > 0) == (run.ratio is not None)
        assert torch.__version__.startswith(run.versions["torch"])
        assert run.hardware["memory_bytes"] > 0
        left = {path.name for path in (folder / run.adapter).parent.iterdir()}
        assert left == {"adapter", "result.json"}


def test_adapters_and_masks_stay_loadable(sweep):
    """Guards the files: frozen entries are those of the start, selected ones are trained."""
    folder, _, results = sweep
    runs = {(run.arm, run.ratio): run for run in results.runs}
    for run in results.runs:
        model = AutoPeftModelForSequenceClassification.from_pretrained(folder / run.adapter)
        assert model.config.num_labels == 2
    one, other = runs["LoRA-FISH", 1.0], runs["LoRA-FISH-rand", 1.0]
    masks = [FishMask.from_pretrained(folder / run.adapter) for run in (one, other)]
    assert masks[0] != masks[1]
    saved = [weights(folder, run) for run in (one, other)]
    for name in masks[0]:
        untouched = ~masks[0][name] & ~masks[1][name]
        key = name.replace(".default.", ".").replace(".modules_to_save.", ".")
        assert torch.equal(saved[0][key][untouched], saved[1][key][untouched])
    assert sum((~masks[0][n] & ~masks[1][n]).sum() for n in masks[0]) > 300


def test_same_config_twice(files, tmp_path, monkeypatch):
    """Guards reproducibility: metrics, curves, masks and weights are equal to the bit."""
    results = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        config = experiment(*files, "out", lora={"dropout": 0.1}, **FEW_ARMS)
        results.append(run_experiment(config, name="e"))
    assert comparable(tmp_path / "one/out") == comparable(tmp_path / "two/out")
    for run in results[0].runs:
        one, two = (weights(tmp_path / name / "out", run) for name in ("one", "two"))
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_variant_is_the_arm_of_its_rule(files, tmp_path):
    """Guards variants: each is what an experiment with that rule alone would give."""
    rules = {
        "warm": {"scoring_point": "warmup", "warmup_steps": 3, "scope": "global"},
        "true": {"estimator": "true", "num_samples": 7, "scope": "balanced"},
    }
    variants = [{"name": name, "rule": rule} for name, rule in rules.items()]
    variants += [{"name": "any", "criterion": "random", "rule": {"scope": "global"}}]
    config = experiment(
        *files,
        tmp_path / "variants",
        fish_tuning={"methods_to_run": ["LoRA-FISH"], "variants": variants},
    )
    own, *others, at_random = run_experiment(config, name="e").runs
    assert [run.arm for run in others] == list(rules)
    assert at_random.trainable_params == own.budget and not at_random.score_histograms
    seen = {str(own.mask_density)}
    for run, rule in zip(others, rules.values(), strict=True):
        alone = experiment(
            *files,
            tmp_path / run.arm,
            fish_tuning={"methods_to_run": ["LoRA-FISH"], **rule},
        )
        (expected,) = run_experiment(alone, name="e").runs
        assert run.mask_density == expected.mask_density and run.metrics == expected.metrics
        assert run.trainable_params == run.budget == own.budget
        seen.add(str(run.mask_density))
    assert len(seen) == 3


def test_a_variant_selects_from_its_own_adapter(files, tmp_path):
    """Guards a variant's adapter: LoRA's own is LoRA-FISH again, another trains its own tensors."""
    rank = experiment(*files, tmp_path).lora.fish_rank
    adapters = {
        "again": {"method": "LORA", "config": {"r": rank, "lora_alpha": 2 * rank}},
        "weights": {"method": "SHIRA", "config": {"r": 4}},
    }
    variants = [{"name": name, "adapter": adapter} for name, adapter in adapters.items()]
    config = experiment(
        *files, tmp_path, fish_tuning={"methods_to_run": ["LoRA-FISH"], "variants": variants}
    )
    own, again, sparse = run_experiment(config, name="e").runs
    assert (again.metrics, again.mask_density) == (own.metrics, own.mask_density)
    assert sparse.trainable_params == own.budget >= sparse.changed_params
    assert all("shira" in name or "classifier" in name for name in weights(tmp_path, sparse))


def test_finished_runs_are_skipped_and_failed_ones_tried_again(files, tmp_path, monkeypatch):
    """Guards a sweep against one bad run, and a rerun against training what is there."""
    config = experiment(*files, tmp_path, **FEW_ARMS, seeds=[1, 2])
    genuine, ran = training.run_arm, []

    def sometimes(arm, *args):
        ran.append((arm.name, arm.seed))
        if arm.name == "LoRA-FISH" and arm.seed == 1 and len(ran) < 5:
            raise RuntimeError("CUDA out of memory")
        return genuine(arm, *args)

    monkeypatch.setattr(training, "run_arm", sometimes)
    results = run_experiment(config, name="e")
    assert [run.status for run in results.runs] == ["finished", "failed", "finished", "finished"]
    assert results.runs[1].error == "RuntimeError: CUDA out of memory"
    again = run_experiment(config, name="e")
    assert ran[4:] == [("LoRA-FISH", 1)]
    assert [run.status for run in again.runs] == ["finished"] * 4
    assert [again.runs[i] for i in (0, 2, 3)] == [results.runs[i] for i in (0, 2, 3)]
    run_experiment(config, name="e")
    assert len(ran) == 5


def test_a_wrong_count_fails_the_run(files, tmp_path, monkeypatch):
    """Guards the promise that a finished run trained its budget to the unit."""
    config = experiment(*files, tmp_path, **FEW_ARMS)
    genuine = prepare.count_parameters

    def one_more(*args):
        counts = genuine(*args)
        key = "Original LoRA", None
        counts[key] = ParameterCounts(counts[key].trainable + 1, counts[key].total)
        return counts

    monkeypatch.setattr(prepare, "count_parameters", one_more)
    results = run_experiment(config, name="e")
    assert [run.status for run in results.runs] == ["failed", "finished"]
    assert "holds 418 scalars where the budget is 419" in results.runs[0].error


def test_a_change_outside_of_the_mask_fails_the_run(files, tmp_path, monkeypatch):
    """Guards the second measurement: what moved is compared with the start, entry by entry."""
    genuine = training.snapshot

    def moved(model, names):
        start = genuine(model, names)
        name = next(name for name in start if "lora_A" in name)
        start[name] += 1e-3
        return start

    monkeypatch.setattr(training, "snapshot", moved)
    results = run_experiment(experiment(*files, tmp_path, **FEW_ARMS), name="e")
    assert results.runs[0].status == "finished"  # dense: all of A may move
    assert results.runs[1].status == "failed"
    assert "scalars changed that should have stayed frozen, in base_model" in results.runs[1].error


def test_ctrl_c_leaves_what_is_finished(files, tmp_path, monkeypatch):
    """Guards an interrupted sweep: what is finished is recorded, nothing is marked as failed."""
    config = experiment(*files, tmp_path, **FEW_ARMS)
    genuine = training.run_arm

    def interrupted(arm, *args):
        if arm.name == "LoRA-FISH":
            raise KeyboardInterrupt
        return genuine(arm, *args)

    monkeypatch.setattr(training, "run_arm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config, name="e")
    assert [run.arm for run in read_results(tmp_path).runs] == ["Original LoRA"]


def test_two_sweeps_in_one_folder(files, tmp_path):
    """Guards two processes against writing over each other: the second one fails at once."""
    with FileLock(tmp_path / LOCK_FILE):
        began = time.monotonic()
        with pytest.raises(ConfigError, match="another process is running an experiment") as raised:
            run_experiment(experiment(*files, tmp_path), name="e")
        assert time.monotonic() - began < 5
    assert repr(str(tmp_path)) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"max_seq_length": 41}}, "max_seq_length: 41 is more than the 40 tokens"),
        ({"training": {"args_override": {"optim": "sgdd"}}}, "training.args_override: .*sgdd"),
        (
            {"training": {"args_override": {"metric_for_best_model": "f1_macro"}}},
            "metric_for_best_model: 'f1_macro' is not computed; use one of accuracy, loss",
        ),
        ({"lora": {"target_modules": ["nope"]}}, "lora.target_modules: .*nope"),
        ({"fish_tuning": {"prune_to_ratio_of_baseline": 0.001}}, "0.001 of the baseline is 0 "),
        ({"peers": [{"method": "IA3", "config": {"rr": 1}}]}, "IA3: IA3Config has no 'rr'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(files, tmp_path, changes, message):
    """Guards users against waiting for training to find a mistake."""
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=message):
        run_experiment(experiment(*files, out, **changes), name="e")
    assert not out.exists()


@pytest.mark.parametrize("point", ["start", "warmup"])
def test_scoring_points(files, tmp_path, point):
    """Guards warm-up: it finds entries of A, and leaves the start as it was."""
    fish = {"scoring_point": point, "warmup_steps": 4, "scope": "global"}
    config = experiment(
        *files,
        tmp_path,
        fish_tuning={"methods_to_run": ["LoRA-FISH"], **fish},
    )
    (run,) = run_experiment(config, name="e").runs
    assert run.status == "finished", run.error
    chosen = sum(tensor.selected for tensor in run.mask_density if "lora_A" in tensor.name)
    assert (chosen > 0) == (point == "warmup")


def test_a_decoder_in_half_precision_on_regression(tmp_path):
    """Guards pad token, bfloat16 with float32 adapters and head, and the metric's direction."""
    config = experiment(
        write_llama(tmp_path / "model"),
        write_data(tmp_path / "data.csv", label="float"),
        tmp_path / "out",
        model={"precision": "bf16"},
        dataset={"metric": "mse"},
        lora={"target_modules": None},
        **FEW_ARMS,
    )
    results = run_experiment(config, name="e")
    for run in results.runs:
        assert run.status == "finished", run.error
        assert run.metrics["mse"] == min(point["mse"] for point in run.curve)
        saved = weights(tmp_path / "out", run)
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


@pytest.mark.parametrize(("cut", "first"), [((), 9), ((8,), 5), ((8, 4), 1)])
def test_an_interrupted_run_goes_on_from_its_last_whole_checkpoint(
    files, tmp_path, monkeypatch, cut, first
):
    """Guards resuming: it happens, not from a damaged checkpoint, and changes no result."""
    config = experiment(*files, "out", lora={"dropout": 0.1}, **FEW_ARMS)
    genuine, reported, stop_at = training.run_arm, [], [10]

    def watched(arm, task, folder, report):
        def reporting(step, *rest):
            reported.append(step)
            if arm.name == "LoRA-FISH" and step in stop_at:
                raise KeyboardInterrupt
            report(step, *rest)

        return genuine(arm, task, folder, reporting)

    for name in ("undisturbed", "interrupted"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "undisturbed")
    run_experiment(config, name="e")
    monkeypatch.chdir(tmp_path / "interrupted")
    monkeypatch.setattr(training, "run_arm", watched)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config, name="e")
    folder = Path("out/runs") / planned(config)[1].run_id / "checkpoints"
    for step in cut:
        file = folder / f"checkpoint-{step}" / "optimizer.pt"
        file.write_bytes(file.read_bytes()[:-100])
    reported.clear()
    stop_at.clear()
    run_experiment(config, name="e")
    assert reported == list(range(first, 13))
    assert comparable(tmp_path / "interrupted/out") == comparable(tmp_path / "undisturbed/out")


# Killed sweeps


def _sweep_in(folder, config):
    os.chdir(folder)
    run_experiment(config, name="e")


def _killed_until_done(context, folder, config, kills, seconds, draw):
    """Runs a sweep, killing it at random moments; returns how many kills hit it."""
    folder.mkdir()
    hits = 0
    while True:
        process = context.Process(target=_sweep_in, args=(folder, config))
        process.start()
        if hits < kills:
            while not (folder / "out/.lock").exists() and process.is_alive():
                time.sleep(0.01)
            # Short enough that all the kills fall before the end.
            process.join(draw.uniform(0, seconds / kills))
            if process.exitcode is None:
                process.kill()
                process.join()
                hits += 1
                continue
        process.join()
        assert process.exitcode == 0
        return hits


def _compare_with_undisturbed(tmp_path, config, kills):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fish_tuning.experiments.runs.sweep"])
    draw = random.Random(os.getpid())
    _killed_until_done(context, tmp_path / "warm", config, 0, 0, draw)
    began = time.monotonic()
    _killed_until_done(context, tmp_path / "undisturbed", config, 0, 0, draw)
    seconds = time.monotonic() - began
    hits = _killed_until_done(context, tmp_path / "killed", config, kills, seconds, draw)
    expected, found = (comparable(tmp_path / name / "out") for name in ("undisturbed", "killed"))
    assert found == expected
    for run in read_results(tmp_path / "killed/out").runs:
        one, two = (weights(tmp_path / name / "out", run) for name in ("undisturbed", "killed"))
        assert all(torch.equal(one[name], two[name]) for name in one)
    return hits


def test_killed_twice(files, tmp_path):
    """Guards resuming: checkpoints, masks, curves and data order after SIGKILL."""
    config = experiment(
        *files,
        "out",
        lora={"dropout": 0.1},
        training={"args_override": {"max_steps": 30, "weight_decay": 0.1}},
        **FEW_ARMS,
    )
    _compare_with_undisturbed(tmp_path, config, 2)


@pytest.mark.slow
def test_killed_ten_times(files, tmp_path):
    """Guards the same over all masked arms, epochs, accumulation and warm-up scoring."""
    args = {"max_steps": -1, "num_train_epochs": 6, "gradient_accumulation_steps": 2}
    args |= {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    config = experiment(
        *files,
        "out",
        lora={"dropout": 0.1},
        training={"args_override": args},
        fish_tuning={"scoring_point": "warmup", "warmup_steps": 3},
        seeds=[1, 2],
    )
    assert _compare_with_undisturbed(tmp_path, config, 10) == 10


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantized_weights(files, tmp_path, quantization):
    """Guards model.quantization: all arms of a seed on the same few bits, at equal counts."""
    bnb = pytest.importorskip("bitsandbytes")
    config = experiment(*files, tmp_path / "out", model={"quantization": quantization}, **FEW_ARMS)
    runs = run_experiment(config, name="quantized").runs
    assert [run.status for run in runs] == ["finished"] * 2
    assert {run.trainable_params for run in runs} == {6 * 64 + 34}
    base = load_model(config.model, load_tokenizer(config.model), 2)
    kind = {"4bit": bnb.nn.Linear4bit, "8bit": bnb.nn.Linear8bitLt}[quantization]
    assert sum(isinstance(module, kind) for module in base.modules()) > 6
    assert type(base.classifier) is torch.nn.Linear
