"""Batches of any loader, and calling a model with what it takes of them."""

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PolyConfig, get_peft_model
from torch import nn
from transformers import BatchEncoding

from fish_tuning.scoring.batches import Forward, batch_size, parts_by_length, take, without_padding
from tests.models import examples_for, pad, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, with_lora


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        ({"input_ids": torch.zeros(3, 7), "labels": torch.zeros(3)}, 3),
        ({"pixels": torch.zeros(1, 7), "labels": torch.zeros(3)}, 3),
        ({"scale": torch.tensor(2.0), "x": torch.zeros(4, 2)}, 4),
        ({"names": ["a", "b"], "x": torch.zeros(4, 2)}, 4),
        ([torch.zeros(5, 2), torch.zeros(5)], 5),
        ((torch.zeros(2, 2), "text"), 2),
        (BatchEncoding({"input_ids": torch.zeros(6, 2)}), 6),
    ],
)
def test_batch_size(batch, size):
    """Guards against counting by a tensor that is not by example."""
    assert batch_size(batch) == size


@pytest.mark.parametrize(
    ("batch", "named"), [({"text": "a", "n": torch.tensor(1)}, "keys text, n"), (["a"], "1 items")]
)
def test_batch_without_tensors_is_refused(batch, named):
    """Guards against an obscure error, far from the loader."""
    with pytest.raises(ValueError, match=f"no tensor in a calibration batch: {named}"):
        batch_size(batch)


def test_take_slices_what_is_by_example():
    """Guards against cutting what all examples share, or leaving whole what is theirs."""
    batch = {
        "labels": torch.arange(4),
        "x": torch.arange(8).view(4, 2),
        "texts": ["a", "b", "c", "d"],
        "shared": torch.arange(3),
        "scalar": torch.tensor(1.0),
        "flag": True,
    }
    part = take(batch, slice(1, 3))
    assert part["labels"].tolist() == [1, 2]
    assert part["x"].tolist() == [[2, 3], [4, 5]]
    assert part["texts"] == ["b", "c"]
    assert part["shared"] is batch["shared"]
    assert part["scalar"] is batch["scalar"]
    assert part["flag"] is True
    x, y = take((torch.arange(4), torch.arange(4)), slice(2, 4))
    assert x.tolist() == y.tolist() == [2, 3]


def padded(lengths, width=None):
    """A batch padded on the right; each token is its example's number."""
    width = max(lengths) if width is None else width
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    rows = torch.arange(len(lengths)).unsqueeze(1)
    return {"input_ids": rows * mask, "attention_mask": mask.long(), "labels": rows.squeeze(1)}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 3), st.integers(1, 5))
def test_parts_hold_every_example_once(lengths, extra, size):
    """Guards lost, doubled or misnumbered examples, and parts wider than they need to be."""
    batch = padded(lengths, max(lengths) + extra)
    numbers = [100 + i for i in range(len(lengths))]
    seen = []
    for part, of_part in parts_by_length(batch, numbers, size):
        part = without_padding(part)
        assert [100 + int(label) for label in part["labels"]] == list(of_part)
        of_lengths = [lengths[number - 100] for number in of_part]
        assert part["attention_mask"].sum(1).tolist() == of_lengths
        assert part["input_ids"].shape == (len(of_part), max(of_lengths))
        assert torch.equal(part["input_ids"].amax(1), part["labels"])
        seen += of_part
    assert sorted(seen) == numbers


@pytest.mark.parametrize(
    "change",
    [
        {"attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])},
        {"attention_mask": torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0]])},
        {"attention_mask": torch.ones(2, 4)},
        {"attention_mask": None},
        {"attention_mask": torch.ones(2, 1, 4, 4)},
        {"labels": torch.tensor([[1, 1, 7, -100], [1, -100, -100, -100]])},
        {"bbox": torch.ones(2, 4, 4)},
        {"scores": torch.ones(2, 4)},
        {"shared": torch.ones(3)},
        {"texts": ["a", "b"]},
    ],
    ids=[
        "left",
        "holes",
        "no padding",
        "no mask",
        "4-d mask",
        "labelled padding",
        "unknown by token",
        "as many columns by chance",
        "not by example",
        "not a tensor",
    ],
)
def test_batches_that_are_left_alone(change):
    """Guards padding that means something, and entries that would no longer fit."""
    batch = {**padded([2, 1], 4), **change}
    assert without_padding(batch) is batch
    assert list(parts_by_length(batch, [5, 6], 1)) == [(batch, [5, 6])]


def test_labels_and_images_are_cut_as_they_should_be():
    """Guards labels by token that keep their padding, and other entries that lose columns."""
    batch = padded([2, 1], 4)
    batch["labels"] = torch.tensor([[1, 2, -100, -100], [3, -100, -100, -100]])
    batch["pixel_values"] = torch.ones(2, 3, 5, 5)
    part = without_padding(batch)
    assert part["labels"].tolist() == [[1, 2], [3, -100]]
    assert part["pixel_values"] is batch["pixel_values"]


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
    (alone,) = Forward(model).on_device(X)
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
