"""Memory of a step without numbers, beside what the same step takes with them."""

from functools import partial

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
from fish_tuning.experiments.memory.live_bytes import WithoutNumbers

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

    def step_of(model):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = model(**batch_for(config)).loss
        loss.backward()

    measured = peak_memory(partial(step_of, model), "cpu")
    with torch.device("meta"):
        empty = model_for(config, trained, checkpointing)
    estimated = WithoutNumbers(empty).peak(partial(step_of, empty))
    assert estimated == pytest.approx(measured, rel=0.01)


class _Reads(torch.nn.Linear):
    """A model that reads a number of its output."""

    def __init__(self, read):
        super().__init__(4, 4, device="meta")
        self.read = read
        self.seen = None

    def forward(self, x):
        y = super().forward(x)
        self.seen = self.read(y)
        return y


def test_conditions_inside_a_model_do_not_hold_and_those_around_it_do():
    """Guards masks that a model makes unless nothing is padded, and checks that would fail."""
    model = _Reads(lambda y: bool(y.isinf().any()))
    around = []

    def run():
        y = model(torch.empty(2, 4))
        around.extend([bool((y == y).all()), y.sum().item(), len((y != 0).nonzero())])

    WithoutNumbers(model).peak(run)
    assert model.seen is False
    assert around == [True, 0, 8]


@pytest.mark.parametrize("read", [lambda y: y.sum().item(), lambda y: (y > 0).nonzero()])
def test_models_that_read_numbers_are_refused(read):
    """Guards against an estimate of a path that the model does not take."""
    model = _Reads(read)
    with pytest.raises(RuntimeError):
        WithoutNumbers(model).peak(lambda: model(torch.empty(2, 4)))
