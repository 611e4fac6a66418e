"""Which runs an experiment has, what they train and where they start."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import BartConfig, BertConfig, GPT2Config, LlamaConfig

from fish_tuning.experiments import arms as arms_module
from fish_tuning.experiments.arms import (
    add_adapter,
    arm_counts,
    names_left_dense,
    planned,
    total_params,
    trainable_counts,
    trainable_tensors,
)
from fish_tuning.experiments.config.load import load_config
from fish_tuning.experiments.data.load import load_data
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.models.load import load_model, load_tokenizer, meta_model
from fish_tuning.experiments.runs import training
from tests.experiments.tiny_experiment import experiment, write_bert, write_data

CONFIGS = Path(__file__).parents[2] / "configs/experiments"
ALL_ARMS = [
    "Original LoRA",
    "LoRA-FISH",
    "LoRA-FISH-rand",
    "LoRA-FISH-rev",
    "LoRA (FISH rank)",
    "LoRA-FA",
]
BERT_BASE = BertConfig(vocab_size=28996)
BERT_TINY = BertConfig(
    hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512
)
TINYLLAMA = LlamaConfig(
    hidden_size=2048,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    intermediate_size=5632,
    vocab_size=32000,
)


def of_model(config, folder, **changes):
    config.save_pretrained(folder)
    return experiment(folder, "unused.csv", "unused", **changes)


@pytest.mark.parametrize(
    ("file", "shape", "baseline", "masked"),
    [
        ("bert_sst2", BERT_BASE, 443_906, 443_906),
        ("tinyllama_rotten_tomatoes_fish_25", TINYLLAMA, 2_256_896, 564_224),
        ("bert_tiny_sst2_fish_50", BERT_TINY, 6_402, 3_201),
    ],
)
def test_the_published_budgets(tmp_path, file, shape, baseline, masked):
    """Guards the published experiments' exact counts, from a config.json alone."""
    shape.save_pretrained(tmp_path)
    config = load_config(CONFIGS / f"{file}.yaml", [f"model.name={tmp_path}"])
    counts = trainable_counts(config, 2)
    assert counts.pop(("Original LoRA", None)) == baseline
    assert set(counts.values()) == {masked} and len(counts) >= 1


def test_totals(tmp_path):
    """Guards the total: PEFT's untrained copy of the head is no parameter of the model."""
    config = of_model(BERT_BASE, tmp_path, lora={"baseline_rank": 8, "fish_rank": 16})
    model = meta_model(config.model, 2)
    base = sum(parameter.numel() for parameter in model.parameters())
    assert total_params(config, 2) == base + 442_368
    counts = arm_counts(config, 2)
    assert counts["LoRA-FISH", 1.0].total == base + 884_736


def test_lora_fa_comes_as_near_to_the_budget_as_it_can(tmp_path):
    """Guards LoRA-FA where inputs and outputs differ in size: its rank is not twice LoRA's."""
    config = of_model(
        TINYLLAMA,
        tmp_path,
        lora={"baseline_rank": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        fish_tuning={"methods_to_run": ["Original LoRA", "LoRA-FA"]},
    )
    found = trainable_counts(config, 2)
    a_rank = 22 * (2048 + 256 + 256 + 2048)
    assert abs(found["LoRA-FA", None] - found["Original LoRA", None]) <= a_rank / 2
    assert (found["LoRA-FA", None] - 4096) % a_rank == 0


def test_the_plan(tmp_path):
    """Guards the order, and that arms without a budget run once a seed."""
    config = experiment(
        tmp_path,
        tmp_path,
        tmp_path,
        fish_tuning={"methods_to_run": ["Original LoRA", "LoRA-FISH"], "budgets": [1.0, 0.25]},
        peers=[{"method": "IA3"}],
        seeds=[1, 2],
    )
    assert [(arm.name, arm.ratio, arm.seed) for arm in planned(config)] == [
        ("Original LoRA", None, 1),
        ("LoRA-FISH", 1.0, 1),
        ("IA3", None, 1),
        ("Original LoRA", None, 2),
        ("LoRA-FISH", 1.0, 2),
        ("IA3", None, 2),
        ("LoRA-FISH", 0.25, 1),
        ("LoRA-FISH", 0.25, 2),
    ]


def test_run_ids(tmp_path):
    """Guards the folders: safe names, distinct where runs differ, the same where they do not."""

    def ids(**changes):
        fish = {"methods_to_run": ALL_ARMS, "budgets": [1.0, 0.5, 0.3333333, 0.3333334]}
        config = experiment(tmp_path, tmp_path, tmp_path, **{"fish_tuning": fish, **changes})
        return [arm.run_id for arm in planned(config)]

    found = ids(peers=[{"method": "IA3", "name": "a/b"}, {"method": "IA3", "name": "a\\b"}])
    assert len(set(found)) == len(found) == 3 + 3 * 4 + 2
    assert all(re.fullmatch(r"[a-z0-9.-]+", name) for name in found)
    assert set(ids()) < set(found) and set(ids()) < set(ids(seeds=[1, 2]))
    assert not set(ids()) & set(ids(lora={"dropout": 0.1}))
    one, other = (
        ids(peers=[{"method": "IA3", "config": c}]) for c in ({}, {"fan_in_fan_out": True})
    )
    assert len(set(one) ^ set(other)) == 2


def test_the_plan_needs_no_torch():
    """Guards the command line's speed: the list of arms comes without slow imports."""
    code = "import sys, fish_tuning.experiments.arms; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("method", ["ADALORA", "VERA", "LOKR", "SHIRA", "OFT", "PROMPT_TUNING"])
def test_peers_are_counted(tmp_path, method):
    """Guards methods whose adapters are no plain matrices: they too are built without weights."""
    extra = {"PROMPT_TUNING": {"num_virtual_tokens": 3}, "SHIRA": {"r": 2}, "OFT": {}}
    extra["OFT"] = {"oft_block_size": 8, "r": 0}
    peers = [{"method": method, "config": extra.get(method, {})}]
    config = of_model(BERT_TINY, tmp_path, peers=peers)
    assert trainable_counts(config, 2)[method, None] > 258


def test_adalora_on_a_model_in_half_precision(tmp_path):
    """Guards AdaLoRA's counts of ranks, which PEFT makes trainable there."""
    model = {"name": str(write_bert(tmp_path)), "precision": "bf16"}
    config = experiment(tmp_path, tmp_path, tmp_path, model=model, peers=[{"method": "ADALORA"}])
    loaded = load_model(config.model, load_tokenizer(config.model), 2)
    adapted = add_adapter(loaded, planned(config)[-1], config, total_steps=10_000)
    trained = sum(tensor.numel() for tensor in trainable_tensors(adapted).values())
    assert trained == trainable_counts(config, 2)["ADALORA", None]


def test_variants_select_from_their_own_adapter(tmp_path):
    """Guards a variant's pool: the budget is LoRA's, what it is selected from its own."""
    shira = {"method": "SHIRA", "config": {"r": 2}}
    fish = {"variants": [{"name": "sparse", "adapter": shira}], "budgets": [0.5]}
    config = of_model(BERT_TINY, tmp_path, fish_tuning=fish, peers=[shira])
    counts = arm_counts(config, 2)
    assert counts["sparse", 0.5].trainable == counts["LoRA-FISH", 0.5].trainable
    assert counts["sparse", 0.5].total == counts["SHIRA", None].total
    assert counts["sparse", 0.5].total != counts["LoRA-FISH", 0.5].total


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"method": "ADALORA"}, r"fish_tuning\.variants: x: AdaLoRA moves its own budget"),
        ({"method": "SHIRA", "config": {"q": 1}}, r"fish_tuning\.variants: x: .* has no 'q'"),
        ({"method": "LORA", "config": {"r": 1}}, r"fish_tuning\.prune.*x's adapter"),
    ],
)
def test_adapters_that_nothing_can_be_selected_from(tmp_path, adapter, message):
    """Guards variants whose adapter keeps its own budget, is mistyped, or is too small."""
    fish = {"variants": [{"name": "x", "adapter": adapter}]}
    with pytest.raises(ConfigError, match=message):
        trainable_counts(of_model(BERT_TINY, tmp_path, fish_tuning=fish), 2)


def test_a_head_that_peft_does_not_know_is_trained(tmp_path, caplog):
    """Guards BART and its like: their head would stay random and frozen."""
    shape = BartConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16
    )
    config = of_model(shape, tmp_path, lora={"target_modules": ["q_proj"]})
    head = 16 * 16 + 16 + 2 * 16 + 2
    assert trainable_counts(config, 2)["Original LoRA", None] == 3 * 2 * 32 + head
    assert "names_to_exclude: ['classifier', 'score'] match none" in caplog.text


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        (GPT2Config(n_embd=16, n_layer=1, n_head=2), {"target_modules": ["nope"]}, "nope"),
        (BERT_TINY, {"target_modules": "all-liner"}, "lora.target_modules: 'all-liner' does not"),
    ],
)
def test_modules_that_are_not_there(tmp_path, shape, changes, message):
    """Guards the message for a wrong target_modules."""
    with pytest.raises(ConfigError, match=message):
        trainable_counts(of_model(shape, tmp_path, lora=changes), 2)


def test_an_architecture_without_a_default(tmp_path, monkeypatch):
    """Guards models that PEFT has no target_modules for: the message says what to set."""
    from peft.tuners.lora import model as lora_model

    monkeypatch.setattr(lora_model.LoraModel, "target_module_mapping", {}, raising=False)
    config = of_model(BERT_TINY, tmp_path, lora={"target_modules": None})
    with pytest.raises(ConfigError, match=r"no default for models of type 'bert'; set lora.target"):
        trainable_counts(config, 2)


@pytest.mark.parametrize("ratio", [0.0001, 1.0])
def test_budgets_that_cannot_be_met(tmp_path, ratio):
    """Guards budgets of nothing and above the adapter that is selected from."""
    config = of_model(
        BERT_TINY,
        tmp_path,
        lora={"baseline_rank": 1 if ratio < 1 else 4, "fish_rank": 2},
        fish_tuning={"prune_to_ratio_of_baseline": ratio},
    )
    with pytest.raises(ConfigError, match=r"fish_tuning.prune_to_ratio_of_baseline: .*Change it"):
        trainable_counts(config, 2)


def test_a_head_above_the_budget_competes(tmp_path, caplog):
    """Guards small budgets beside a large head, RoBERTa's for one: the count still holds."""
    config = of_model(
        BERT_TINY,
        tmp_path,
        lora={"baseline_rank": 1, "fish_rank": 2},
        fish_tuning={"prune_to_ratio_of_baseline": 0.05},
    )
    counts = trainable_counts(config, 2)
    budget = round(0.05 * counts["Original LoRA", None])
    assert counts["LoRA-FISH", 0.05] == budget
    assert f"more entries than the budget of {budget}" in caplog.text
    head = {"classifier.weight": budget - 1, "lora_A.weight": 500}
    assert names_left_dense(config, head, budget) == [r"^classifier\.weight$"]
    assert names_left_dense(config, head | {"classifier.bias": 1}, budget) == []


def test_all_arms_of_a_seed_start_alike(tmp_path):
    """Guards the comparison: one head for all, one adapter where ranks agree, other by seed."""
    model, data = write_bert(tmp_path / "model"), write_data(tmp_path / "data.csv")
    config = experiment(
        model, data, tmp_path, fish_tuning={"methods_to_run": ALL_ARMS}, seeds=[1, 2]
    )
    task = training.Task(
        config=config,
        data=load_data(config.dataset),
        train=Dataset.from_dict({"labels": [0]}),
        validation=Dataset.from_dict({"labels": [0]}),
        tokenizer=load_tokenizer(config.model),
        counts={},
        commit=None,
    )
    starts = {}
    for arm in planned(config):
        args = training.training_arguments(config, tmp_path, arm.seed)
        torch.manual_seed(len(starts))
        model, names = training.start_of(arm, task, args)
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


def test_lora_fa_trains_b_alone(tmp_path):
    """Guards LoRA-FA: A is in the adapter and not trained; the scale is that of every rank."""
    config = of_model(BERT_TINY, tmp_path, fish_tuning={"methods_to_run": ["LoRA-FA"]})
    (arm,) = planned(config)
    model = arms_module._meta_peft_model(config, arm, 2)
    trained = trainable_tensors(model)
    assert not any("lora_A" in name for name in trained) and len(trained) == 6 + 2
    settings = model.peft_config["default"]
    assert (settings.r, settings.lora_alpha) == (4, 8)
