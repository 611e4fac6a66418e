"""Memory of a step without numbers, beside what the same step takes with them."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
)

from benchmarks.measure import peak_memory
from fish_tuning.experiments.models.live_bytes import peak_of_step

LLAMA = LlamaConfig(
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=900,
)
GPT2 = GPT2Config(n_embd=96, n_layer=3, n_head=4, vocab_size=900, n_positions=64)
BERT = BertConfig(
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    vocab_size=900,
)
CASES = [
    (LLAMA, "lora", None, False),
    (LLAMA, "lora", torch.bfloat16, False),
    (LLAMA, "lora", None, True),
    (LLAMA, "all", None, False),
    (GPT2, "lora", None, False),
    (BERT, "lora", None, False),
    (BERT, "all", None, False),
]


def model_for(config, trained, checkpointing):
    torch.manual_seed(0)
    if isinstance(config, BertConfig):
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    if trained == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    return model.train()


def batch_for(config):
    ids = torch.randint(0, 900, (8, 48))
    labels = torch.zeros(8, dtype=torch.long) if isinstance(config, BertConfig) else ids
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize(("config", "trained", "autocast", "checkpointing"), CASES)
def test_peak_is_that_of_a_real_step(config, trained, autocast, checkpointing):
    """Guards against estimates that leave out, or count twice, what a step holds."""
    model = model_for(config, trained, checkpointing)

    def step():
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = model(**batch_for(config)).loss
        loss.backward()

    measured = peak_memory(step, "cpu")
    with torch.device("meta"):
        empty = model_for(config, trained, checkpointing)
    estimated = peak_of_step(empty, lambda: batch_for(config), autocast=autocast)
    assert estimated == pytest.approx(measured, rel=0.01)
