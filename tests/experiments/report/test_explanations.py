"""What each arm is, and which weights the metrics are of, in a sentence."""

from fish_tuning.experiments.report.arm_runs import group_runs
from fish_tuning.experiments.report.explanations import explain_arms, explain_checkpoint
from fish_tuning.experiments.results import Evaluated
from tests.experiments.sweep_sample import make_run
from tests.experiments.tiny_experiment import ALL_ARMS, experiment


def config_of(tmp_path, **changes):
    return experiment(tmp_path, tmp_path, tmp_path, **changes)


def test_every_arm_is_explained(tmp_path):
    """Guards arms that a reader would have to look up."""
    variants = [{"name": "ours", "criterion": "magnitude", "rule": {"num_samples": 4}}]
    peers = [{"name": "adapter", "method": "IA3", "config": {"feedforward_modules": []}}]
    config = config_of(tmp_path, fish_tuning={"variants": variants}, peers=peers)
    masked = {"LoRA-FISH", "LoRA-FISH-rand", "LoRA-FISH-rev", "ours"}
    arms = [*ALL_ARMS, "ours", "adapter", "unheard of"]
    runs = [make_run(arm, 1, ratio) for arm in arms for ratio in (0.5, 1.0)]
    runs = [run if run.arm in masked else run.model_copy(update={"ratio": None}) for run in runs]
    found = explain_arms(group_runs(runs), config)
    assert list(found) == arms and len(set(found.values())) == len(arms)
    assert found["LoRA-FISH"] == (
        "LoRA of rank 8; only entries with the most Fisher information are trained: 100%, 50% of "
        "Original LoRA's number."
    )
    assert found["Original LoRA"].startswith("LoRA of rank 2, all of it trained")
    assert "with the largest weights" in found["ours"] and "num_samples: 4" in found["ours"]
    assert found["adapter"].startswith("PEFT's IA3 with feedforward_modules")
    assert explain_arms(group_runs(runs), None)["LoRA-FISH"].startswith("LoRA; only entries")


def test_which_checkpoint(tmp_path):
    """Guards against metrics of the best checkpoint that pass for those of the last step."""
    config = config_of(tmp_path)
    runs = [
        make_run("LoRA-FISH", seed, evaluated=Evaluated(step=step, best_by="accuracy"))
        for seed, step in ((1, 4), (2, 12))
    ]
    found = explain_checkpoint(runs, config)
    assert "checkpoint with the best Accuracy (step 4 to 12)" in found
    last = [make_run("LoRA-FISH", 1, evaluated=Evaluated(step=12, best_by=None))]
    assert "after the last step (step 12)" in explain_checkpoint(last, None)
    older = [make_run("LoRA-FISH", 1)]
    assert "checkpoint with the best Accuracy" in explain_checkpoint(older, config)
    assert explain_checkpoint(older, None) == explain_checkpoint([], config) == ""
