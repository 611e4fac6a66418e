"""Padding is cut only where the model computes the same without it, and the model is given back."""

import pytest
import torch
import torch.nn.functional as F
import transformers as tr
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from fish_tuning import calculate_fisher_information
from tests.models import assert_scores_close, examples_for, naive_scores, pad, tiny_bert, with_lora


def scored(model, loader):
    return calculate_fisher_information(model, loader, progress=False)


def rows(batch):
    return [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(batch["labels"]))]


def loop(model, batch):
    return naive_scores(model, rows(batch), loss=lambda model, row: model(**row).loss)


class Head(nn.Module):
    """A head that reads the padding too."""

    def __init__(self, how, width):
        super().__init__()
        self.bert = with_lora(tiny_bert(), init_lora_weights=False).base_model.model.bert
        self.how, self.head = how, nn.Linear(12 * width if how == "flatten" else 12, 3)

    def forward(self, input_ids, attention_mask=None, labels=None):
        h = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        pooled = {"flatten": h.flatten(1), "mean": h.mean(1), "last": h[:, -1]}[self.how]
        logits = self.head(pooled)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


@pytest.mark.parametrize("how", ["flatten", "mean", "last"])
def test_padding_that_the_head_reads_is_kept(how):
    """Guards against other scores, or an error, for a head over all positions."""
    batch = pad(examples_for(tiny_bert(), 10, shortest=3, longest=9))
    torch.manual_seed(0)
    model = Head(how, batch["input_ids"].shape[1]).double().eval()
    assert_scores_close(scored(model, [batch]), loop(model, batch))


def test_labels_of_tokens_are_cut_contiguously():
    """Guards models that call `view` on their labels, as transformers' token classifiers do."""
    model = with_lora(tiny_bert(task="TokenClassification"), init_lora_weights=False).double()
    batch = pad(examples_for(model, 4, shortest=3, longest=6))
    wider = {key: F.pad(v, (0, 3), value=-100 * (key == "labels")) for key, v in batch.items()}
    assert_scores_close(scored(model, [wider]), loop(model, batch))


def test_big_bird_keeps_its_attention():
    """Guards against padding that decides how BigBird attends, and against a changed model."""
    torch.manual_seed(0)
    config = tr.BigBirdConfig(
        vocab_size=40,
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        block_size=4,
        num_random_blocks=1,
        pad_token_id=0,
        initializer_range=0.2,
    )
    config.num_labels = 3
    lora = {"target_modules": ["query", "value"], "init_lora_weights": False}
    model = with_lora(tr.BigBirdForSequenceClassification(config), **lora).double().eval()
    bert = model.get_base_model().bert
    short = pad(examples_for(model, 4))
    attention = bert.encoder.layer[0].attention.self
    scored(model, [short])
    assert bert.attention_type == "block_sparse"
    assert bert.encoder.layer[0].attention.self is attention
    width = 48 - short["input_ids"].shape[1]
    long = {k: v if v.dim() == 1 else F.pad(v, (0, width)) for k, v in short.items()}
    assert_scores_close(scored(model, [long]), loop(model, long))


def test_the_kind_of_labels_is_not_noted():
    """Guards a config that remembers labels of the wrong type, so that the right ones fail."""
    model = with_lora(tiny_bert(), init_lora_weights=False).double().eval()
    model.config.problem_type = None
    batch = pad(examples_for(model, 4))
    with pytest.raises(ValueError, match="size"):
        scored(model, [{**batch, "labels": batch["labels"].double()}])
    assert model.config.problem_type is None
    assert_scores_close(scored(model, [batch]), loop(model, batch))
    model.config.problem_type = None
    scored(model, [batch])
    assert model.config.problem_type is None


@pytest.mark.parametrize("task", ["TokenClassification", "MaskedLM"])
def test_labels_by_token_in_parts(task):
    """Guards more examples than are scored at a time: models flatten their labels with `view`."""
    model = with_lora(tiny_bert(task=task), init_lora_weights=False).double().eval()
    batch = pad(examples_for(model, 10, shortest=3, longest=9))
    expected = loop(model, batch)
    assert_scores_close(scored(model, [batch]), expected)
