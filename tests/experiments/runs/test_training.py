"""Single runs: where they start."""

import torch
from datasets import Dataset

from fish_tuning.experiments.arms import planned
from fish_tuning.experiments.data.load import load_data
from fish_tuning.experiments.models.load import load_tokenizer
from fish_tuning.experiments.runs import training
from fish_tuning.experiments.runs.arguments import training_arguments
from fish_tuning.experiments.runs.prepare import PreparedExperiment
from tests.experiments.tiny_experiment import ALL_ARMS, experiment, write_bert, write_data


def prepared_for(config):
    return PreparedExperiment(
        config=config,
        data=load_data(config.dataset),
        train=Dataset.from_dict({"labels": [0]}),
        validation=Dataset.from_dict({"labels": [0]}),
        tokenizer=load_tokenizer(config.model),
        counts={},
        commit=None,
    )


def test_all_arms_of_a_seed_start_alike(tmp_path):
    """Guards the comparison: one head for all, one adapter where ranks agree, other by seed."""
    model, data = write_bert(tmp_path / "model"), write_data(tmp_path / "data.csv")
    config = experiment(
        model, data, tmp_path, fish_tuning={"methods_to_run": ALL_ARMS}, seeds=[1, 2]
    )
    prepared = prepared_for(config)
    starts = {}
    for arm in planned(config):
        args = training_arguments(config, tmp_path, arm.seed)
        torch.manual_seed(len(starts))
        model, names = training.start_of(arm, prepared, args)
        starts[arm.name, arm.seed] = training.snapshot(model, names)
    fish = starts["LoRA-FISH", 1]
    assert any("lora_A" in name for name in fish)
    for name in ("LoRA-FISH-rand", "LoRA-FISH-rev", "LoRA (FISH rank)"):
        assert fish.keys() == starts[name, 1].keys()
        assert all(torch.equal(fish[key], starts[name, 1][key]) for key in fish)
    heads = [key for key in fish if "classifier" in key]
    assert len(heads) == 2
    for name in ALL_ARMS:
        assert all(torch.equal(fish[key], starts[name, 1][key]) for key in heads)
    assert not torch.equal(fish[heads[0]], starts["LoRA-FISH", 2][heads[0]])
    frozen_a = {key for key in starts["LoRA-FA", 1] if "lora_A" in key}
    assert frozen_a


def test_layers_are_checkpointed_from_the_start(tmp_path):
    """Guards scoring, which comes before a Trainer turns gradient checkpointing on."""
    model, data = write_bert(tmp_path / "model"), write_data(tmp_path / "data.csv")
    overrides = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": None}
    config = experiment(model, data, tmp_path, training={"args_override": overrides})
    args = training_arguments(config, tmp_path, 1)
    started, _ = training.start_of(planned(config)[0], prepared_for(config), args)
    assert started.is_gradient_checkpointing
