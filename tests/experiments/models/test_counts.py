"""Exact counts of every arm, from a config.json alone."""

from pathlib import Path

import pytest
from transformers import BartConfig, BertConfig, LlamaConfig

from fish_tuning.experiments.config.load import load_config
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.models.counts import count_parameters, names_left_dense
from fish_tuning.experiments.models.load import meta_model
from tests.experiments.models.arm_counts import BERT_TINY, of_model, trainable

CONFIGS = Path(__file__).parents[3] / "configs/experiments"
BERT_BASE = BertConfig(vocab_size=28996)
TINYLLAMA = LlamaConfig(
    hidden_size=2048,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    intermediate_size=5632,
    vocab_size=32000,
)


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
    counts = trainable(config, 2)
    assert counts.pop(("Original LoRA", None)) == baseline
    assert set(counts.values()) == {masked} and len(counts) >= 1


def test_totals(tmp_path):
    """Guards the total: PEFT's untrained copy of the head is no parameter of the model."""
    config = of_model(BERT_BASE, tmp_path, lora={"baseline_rank": 8, "fish_rank": 16})
    model = meta_model(config.model, 2)
    base = sum(parameter.numel() for parameter in model.parameters())
    counts = count_parameters(config, 2)
    assert counts["Original LoRA", None].total == base + 442_368
    assert counts["LoRA-FISH", 1.0].total == base + 884_736


def test_lora_fa_comes_as_near_to_the_budget_as_it_can(tmp_path):
    """Guards LoRA-FA where inputs and outputs differ in size: its rank is not twice LoRA's."""
    config = of_model(
        TINYLLAMA,
        tmp_path,
        lora={"baseline_rank": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        fish_tuning={"methods_to_run": ["Original LoRA", "LoRA-FA"]},
    )
    found = trainable(config, 2)
    a_rank = 22 * (2048 + 256 + 256 + 2048)
    assert abs(found["LoRA-FA", None] - found["Original LoRA", None]) <= a_rank / 2
    assert (found["LoRA-FA", None] - 4096) % a_rank == 0


@pytest.mark.parametrize("method", ["ADALORA", "VERA", "LOKR", "SHIRA", "OFT", "PROMPT_TUNING"])
def test_peers_are_counted(tmp_path, method):
    """Guards methods whose adapters are no plain matrices: they too are built without weights."""
    extra = {"PROMPT_TUNING": {"num_virtual_tokens": 3}, "SHIRA": {"r": 2}, "OFT": {}}
    extra["OFT"] = {"oft_block_size": 8, "r": 0}
    peers = [{"method": method, "config": extra.get(method, {})}]
    config = of_model(BERT_TINY, tmp_path, peers=peers)
    assert trainable(config, 2)[method, None] > 258


def test_variants_select_from_their_own_adapter(tmp_path):
    """Guards a variant's pool: the budget is LoRA's, what it is selected from its own."""
    shira = {"method": "SHIRA", "config": {"r": 2}}
    fish = {"variants": [{"name": "sparse", "adapter": shira}], "budgets": [0.5]}
    config = of_model(BERT_TINY, tmp_path, fish_tuning=fish, peers=[shira])
    counts = count_parameters(config, 2)
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
        trainable(of_model(BERT_TINY, tmp_path, fish_tuning=fish), 2)


def test_a_head_that_peft_does_not_know_is_trained(tmp_path, caplog):
    """Guards BART and its like: their head would stay random and frozen."""
    shape = BartConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16
    )
    config = of_model(shape, tmp_path, lora={"target_modules": ["q_proj"]})
    head = 16 * 16 + 16 + 2 * 16 + 2
    assert trainable(config, 2)["Original LoRA", None] == 3 * 2 * 32 + head
    assert "names_to_exclude: ['classifier', 'score'] match none" in caplog.text


@pytest.mark.parametrize("ratio", [0.0001, 1.0])
def test_budgets_that_cannot_be_met(tmp_path, ratio):
    """Guards budgets of nothing and above the adapter that is selected from."""
    config = of_model(
        BERT_TINY,
        tmp_path,
        lora={"baseline_rank": 1 if ratio < 1 else 4, "fish_rank": 2},
        fish_tuning={"prune_to_ratio_of_baseline": ratio},
    )
    with pytest.raises(ConfigError, match=r"prune_to_ratio_of_baseline: .*Change num_trainable"):
        trainable(config, 2)


def test_a_head_above_the_budget_competes(tmp_path, caplog):
    """Guards small budgets beside a large head, RoBERTa's for one: the count still holds."""
    config = of_model(
        BERT_TINY,
        tmp_path,
        lora={"baseline_rank": 1, "fish_rank": 2},
        fish_tuning={"prune_to_ratio_of_baseline": 0.05},
    )
    counts = trainable(config, 2)
    budget = round(0.05 * counts["Original LoRA", None])
    assert counts["LoRA-FISH", 0.05] == budget
    assert f"more entries than the budget of {budget}" in caplog.text
    head = {"classifier.weight": budget - 1, "lora_A.weight": 500}
    assert names_left_dense(config, head, budget) == [r"^classifier\.weight$"]
    assert names_left_dense(config, head | {"classifier.bias": 1}, budget) == []
