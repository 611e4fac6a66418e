"""The adapters of the arms: what they train, and what they refuse."""

import pytest
from transformers import GPT2Config

from fish_tuning.experiments.arms import planned
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.models.adapters import (
    adapted_without_weights,
    add_adapter,
    trainable_tensors,
)
from fish_tuning.experiments.models.load import load_model, load_tokenizer
from tests.experiments.models.arm_counts import BERT_TINY, of_model, trainable
from tests.experiments.tiny_experiment import experiment, write_bert


def test_lora_fa_trains_b_alone(tmp_path):
    """Guards LoRA-FA: A is in the adapter and not trained; the scale is that of every rank."""
    config = of_model(BERT_TINY, tmp_path, fish_tuning={"methods_to_run": ["LoRA-FA"]})
    (arm,) = planned(config)
    model = adapted_without_weights(config, arm, 2)
    trained = trainable_tensors(model)
    assert not any("lora_A" in name for name in trained) and len(trained) == 6 + 2
    settings = model.peft_config["default"]
    assert (settings.r, settings.lora_alpha) == (4, 8)


def test_adalora_on_a_model_in_half_precision(tmp_path):
    """Guards AdaLoRA's counts of ranks, which PEFT makes trainable there."""
    model = {"name": str(write_bert(tmp_path)), "precision": "bf16"}
    config = experiment(tmp_path, tmp_path, tmp_path, model=model, peers=[{"method": "ADALORA"}])
    loaded = load_model(config.model, load_tokenizer(config.model), 2)
    adapted = add_adapter(loaded, planned(config)[-1], config, total_steps=10_000)
    trained = sum(tensor.numel() for tensor in trainable_tensors(adapted).values())
    assert trained == trainable(config, 2)["ADALORA", None]


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
        trainable(of_model(shape, tmp_path, lora=changes), 2)


def test_an_architecture_without_a_default(tmp_path, monkeypatch):
    """Guards models that PEFT has no target_modules for: the message says what to set."""
    from peft.tuners.lora import model as lora_model

    monkeypatch.setattr(lora_model.LoraModel, "target_module_mapping", {}, raising=False)
    config = of_model(BERT_TINY, tmp_path, lora={"target_modules": None})
    with pytest.raises(ConfigError, match=r"no default for models of type 'bert'; set lora.target"):
        trainable(config, 2)
