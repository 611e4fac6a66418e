"""Calling a model with a batch."""

import logging

import pytest
import torch
from peft import LoraConfig, PolyConfig, get_peft_model
from torch import nn
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

from fish_tuning.scoring.inputs.forward import Forward
from tests.models import examples_for, pad, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, with_lora


class Recorder(nn.Module):
    """Records what its forward is called with."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(2, 2)

    def forward(self, x, mask=None, labels=None):
        self.called = {"x": x, "mask": mask, "labels": labels}
        return self.lin(x)


class Anything(Recorder):
    def forward(self, **kwargs):
        self.called = kwargs
        return self.lin(kwargs["x"])


class NeedsLabels(Recorder):
    def forward(self, x, labels):
        self.called = {"x": x, "labels": labels}
        return self.lin(x)


X, Y = torch.zeros(3, 2), torch.zeros(3)


def test_a_mixed_model_takes_what_its_base_model_takes(caplog):
    """Guards against a TypeError below a wrapper that takes anything and passes it on."""
    lora = LoraConfig(r=2, target_modules=["query"])
    forward = Forward(get_peft_model(tiny_bert(), lora, mixed=True).eval())
    batch = pad(examples_for(forward.model, 3))
    with torch.no_grad():
        found = forward({**batch, "idx": Y}, with_labels=True)
        expected = forward.model(**batch)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    assert "BertForSequenceClassification.forward does not take them: idx" in caplog.text


def test_no_cache_below_the_head():
    """Guards models whose head passes `use_cache` on: with a cache, transformers ignores position
    ids that start again."""
    settings = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40}
    model = GraniteMoeForCausalLM(GraniteMoeConfig(**settings, **heads)).eval()
    with torch.no_grad():
        outputs = Forward(model)(pad(examples_for(tiny_llama(), 2)), with_labels=False)
    assert outputs.past_key_values is None


def test_unknown_keys_are_dropped_and_named_once(caplog):
    """Guards against a TypeError for a tokenizer's extra column, and a line for every batch."""
    model = Recorder()
    forward = Forward(model)
    for extra in ({"idx": Y, "text": ["a"] * 3}, {"idx": Y}, {"idx": Y, "other": Y}):
        forward({"x": X, "labels": Y, **extra}, with_labels=False)
    assert [record.getMessage() for record in caplog.records] == [
        "Dropped from the calibration batches, as Recorder.forward does not take them: idx, text",
        "Dropped from the calibration batches, as Recorder.forward does not take them: other",
    ]
    assert model.called["x"] is X


def test_labels_go_to_the_model_only_where_asked():
    """Guards against a loss over all the vocabulary that nobody reads."""
    model = Recorder()
    batch = {"x": X, "labels": Y}
    Forward(model)(batch, with_labels=True)
    assert model.called["labels"] is Y
    Forward(model)(batch, with_labels=False)
    assert model.called["labels"] is None
    assert batch.keys() == {"x", "labels"}


def test_labels_that_forward_requires_stay():
    """Guards against a TypeError where labels have no default."""
    model = NeedsLabels()
    Forward(model)({"x": X, "labels": Y}, with_labels=False)
    assert model.called["labels"] is Y


def test_forward_of_keywords_takes_all(caplog):
    """Guards against dropping everything where the signature names nothing."""
    model = Anything()
    Forward(model)({"x": X, "idx": Y}, with_labels=True)
    assert model.called.keys() == {"x", "idx"}
    assert not caplog.records


@pytest.mark.parametrize("kind", [list, tuple])
def test_sequences_call_with_the_first_item(kind):
    """Guards against passing the labels of (input, labels) batches as an argument."""
    model = Recorder()
    Forward(model)(kind([X, Y]), with_labels=True)
    assert model.called["x"] is X
    assert model.called["labels"] is None


def test_on_device_moves_tensors_and_keeps_the_rest():
    """Guards against batches left where the loader made them."""
    model = nn.Linear(2, 2, device="meta")
    moved = Forward(model).on_device({"x": X, "n": 3, "text": ["a"]})
    assert moved["x"].device.type == "meta"
    assert (moved["n"], moved["text"]) == (3, ["a"])
    assert [x.device.type for x in Forward(model).on_device((X, Y))] == ["meta", "meta"]
    (alone,) = Forward(model).on_device(Forward(model).read(X))
    assert alone.device.type == "meta"


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("build", [tiny_bert, tiny_llama, tiny_gpt2, tiny_t5])
def test_labels_left_out_change_no_logits(build, peft):
    """Guards against other logits without labels: T5 makes its decoder's input of them."""
    model = with_lora(build(), init_lora_weights=False) if peft else build()
    model.eval()
    batch = pad(examples_for(model, 3))
    without = Forward(model)(batch, with_labels=False)
    assert without.loss is None
    expected = model(**batch)
    torch.testing.assert_close(without.logits, expected.logits, rtol=0, atol=0)
    assert without.get("past_key_values") is None


def test_own_decoder_inputs_are_kept():
    """Guards against replacing the decoder inputs that a batch brings."""
    model = tiny_t5().eval()
    batch = {**pad(examples_for(model, 3)), "decoder_input_ids": torch.full((3, 4), 5)}
    without = Forward(model)(batch, with_labels=False)
    del batch["labels"]
    torch.testing.assert_close(without.logits, model(**batch).logits, rtol=0, atol=0)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_padding_on_the_left_moves_no_position(build):
    """Guards against positions that count the padding."""
    model = build().eval()
    examples = examples_for(model, 4)
    padded = Forward(model)(pad(examples, side="left"), with_labels=False).logits
    for logits, example in zip(padded, examples, strict=True):
        alone = model(input_ids=example["input_ids"][None]).logits[0]
        torch.testing.assert_close(logits[-len(alone) :], alone, rtol=1e-5, atol=1e-5)


def test_own_positions_are_kept():
    """Guards against replacing the positions that a batch brings."""
    model = tiny_gpt2().eval()
    batch = pad(examples_for(model, 4), side="left")
    batch["position_ids"] = torch.ones_like(batch["input_ids"])
    logits = Forward(model)(batch, with_labels=False).logits
    torch.testing.assert_close(logits, model(**batch).logits, rtol=0, atol=0)


def test_nothing_is_dropped_of_a_tokenizers_batch(caplog):
    """Guards against dropping token types, or a PEFT model's arguments, as unknown."""
    caplog.set_level(logging.WARNING)
    model = with_lora(tiny_bert())
    batch = pad(examples_for(model, 3))
    Forward(model)({**batch, "token_type_ids": batch["attention_mask"]}, with_labels=False)
    assert not caplog.records


def test_peft_keeps_task_ids_for_itself(caplog):
    """Guards methods for several tasks against the scores of another task."""
    config = PolyConfig(r=2, n_tasks=2, target_modules=["query"], task_type="SEQ_CLS")
    torch.manual_seed(0)
    model = get_peft_model(tiny_bert(), config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    batch = pad(examples_for(model, 3))
    logits = [
        Forward(model)({**batch, "task_ids": torch.full((3,), task)}, with_labels=False).logits
        for task in range(2)
    ]
    assert not torch.allclose(*logits)
    assert not caplog.records
