"""An arm whose ranks Fisher information chooses."""

import json

import pytest
import torch

from fish_tuning.experiments.runs import training
from fish_tuning.experiments.runs.sweep import run_experiment
from tests.experiments.runs.records import comparable, weights
from tests.experiments.tiny_experiment import experiment


def with_ranks(files, *budgets):
    fish = {"methods_to_run": ["Original LoRA", "LoRA-FISH-ranks"], "budgets": list(budgets)}
    return experiment(*files, "out", fish_tuning=fish, lora={"baseline_rank": 3, "dropout": 0.1})


def rank_pattern(folder, run):
    config = json.loads((folder / run.adapter / "adapter_config.json").read_text())
    return config["rank_pattern"]


def test_an_ordinary_lora_with_chosen_ranks(files, tmp_path, monkeypatch):
    """Guards the arm: exact counts, ranks that differ, no mask, and its place in the record."""
    monkeypatch.chdir(tmp_path)
    lora, full, less = run_experiment(with_ranks(files, 1.0, 0.6), name="e").runs
    # Six modules of 16 x 16, and a head of 34.
    assert lora.trainable_params == full.trainable_params == 6 * 3 * 32 + 34
    assert less.trainable_params == (0.6 * lora.trainable_params - 34) // 32 * 32 + 34
    for run in (full, less):
        ranks = rank_pattern(tmp_path / "out", run)
        assert 32 * sum(ranks.values()) + 34 == run.trainable_params == run.budget
        assert len(set(ranks.values())) > 1
        assert run.mask_density == [] and run.score_seconds > 0
        # Scored is the LoRA of lora.fish_rank.
        sizes = {h.kind: sum(h.counts) + h.zeros for h in run.score_histograms}
        assert sizes == {"lora_A": 768, "lora_B": 768, "other": 34}


def test_an_interrupted_run(files, tmp_path, monkeypatch):
    """Guards resuming: the stored ranks are used again, and give the same run to the bit."""
    config, genuine = with_ranks(files, 1.0), training.run_arm

    def stopping(arm, task, folder, report):
        def reporting(step, *rest):
            if arm.chooses_ranks and step == 10:
                raise KeyboardInterrupt
            report(step, *rest)

        return genuine(arm, task, folder, reporting)

    for name in ("undisturbed", "interrupted"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "undisturbed")
    expected = run_experiment(config, name="e")
    monkeypatch.chdir(tmp_path / "interrupted")
    monkeypatch.setattr(training, "run_arm", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config, name="e")
    monkeypatch.setattr(training, "run_arm", genuine)
    monkeypatch.setattr(training, "ranks_by_fisher", None)
    run_experiment(config, name="e")
    assert comparable(tmp_path / "interrupted/out") == comparable(tmp_path / "undisturbed/out")
    for run in expected.runs:
        one, two = (weights(tmp_path / n / "out", run) for n in ("undisturbed", "interrupted"))
        assert all(torch.equal(one[name], two[name]) for name in one)
