"""Which examples of a language model are compared with its own loss, and together with which."""

from unittest.mock import Mock

import pytest

from fish_tuning import calculate_fisher_information
from fish_tuning.scoring.inputs.batches import IGNORED
from fish_tuning.scoring.losses import whole_batches
from tests.models import (
    assert_scores_close,
    batches_of,
    examples_for,
    naive_scores,
    tiny_llama,
    with_lora,
)


def scored(model, loader):
    return calculate_fisher_information(model, loader, progress=False)


@pytest.fixture
def model():
    return with_lora(tiny_llama(), init_lora_weights=False).double()


@pytest.fixture
def compared(monkeypatch):
    """Rows of the batches whose own loss is compared, where all logits count as large."""
    comparing = Mock(wraps=whole_batches.explains)
    monkeypatch.setattr(whole_batches, "explains", comparing)
    monkeypatch.setattr(whole_batches, "LARGE_LOGITS", 0)
    return lambda: [len(call.args[1]) for call in comparing.call_args_list]


def test_large_logits_of_two_examples_are_compared(model, compared):
    """Guards the memory of the first batch, whose logits stay beside those of the own loss."""
    examples = examples_for(model, 10)
    loader = batches_of(examples, 5)
    assert_scores_close(scored(model, loader), naive_scores(model, examples))
    assert compared() == [2]


def test_small_logits_are_compared_together(model, compared, monkeypatch):
    """Guards the time of small models: a batch is one pass."""
    monkeypatch.setattr(whole_batches, "LARGE_LOGITS", 2**22)
    scored(model, batches_of(examples_for(model, 10), 5))
    assert compared() == [5]


def test_examples_without_labels_are_not_what_is_compared(model, compared):
    """Guards against a first pair that has nothing to compare."""
    examples = examples_for(model, 7)
    for example in examples[:3]:
        example["labels"] = example["labels"].clone().fill_(IGNORED)
    scored(model, batches_of(examples, 7))
    assert compared() == [2]


def test_the_recognized_example_is_compared_wherever_it_is(model, compared, monkeypatch):
    """Guards against losses that change with the batch, in what follows the first two examples."""
    examples = examples_for(model, 6)
    for example in examples[:5]:
        example["labels"][2:] = IGNORED
    note = whole_batches.WholeBatches.note_alone

    def note_another(self, number, own, logits, labels):
        assert number == 5
        note(self, number, own + 1, logits, labels)

    monkeypatch.setattr(whole_batches.WholeBatches, "note_alone", note_another)
    with pytest.raises(ValueError, match="example 5 has the loss"):
        scored(model, batches_of(examples, 6))
