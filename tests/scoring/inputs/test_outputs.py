"""Outputs as people's modules return them, against a loop over examples."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fish_tuning import calculate_fisher_information
from tests.models import assert_scores_close, naive_scores, tiny_llama, with_lora

IDS = torch.randint(3, 40, (4, 9), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}
ROWS = [{key: value[i : i + 1] for key, value in BATCH.items()} for i in range(4)]


def scored(model, loader, **options):
    return calculate_fisher_information(model, loader, progress=False, **options)


class ValueHead(nn.Module):
    """As TRL's models with a value head: (logits, loss, value)."""

    def __init__(self, extra=0.0):
        super().__init__()
        self.inner = with_lora(tiny_llama(), init_lora_weights=False)
        self.extra = extra

    def forward(self, input_ids, labels=None):
        outputs = self.inner(input_ids=input_ids, labels=labels)
        loss = outputs.loss
        if loss is not None and self.extra:
            loss = loss + self.extra * outputs.logits.square().mean()
        return outputs.logits, loss, outputs.logits[..., 0]


class LogitsOnly(ValueHead):
    def forward(self, input_ids):
        return self.inner(input_ids=input_ids).logits


def test_a_loss_after_the_logits():
    """Guards a language model that is read as one that labels its own tokens."""
    model = ValueHead().double()
    expected = naive_scores(model, ROWS, loss=lambda model, row: model(**row)[1])
    assert_scores_close(scored(model, [BATCH]), expected, rtol=1e-6)


def test_a_number_after_the_logits_that_may_be_anything():
    """Guards an auxiliary term that is scored as if it were the loss."""
    with pytest.raises(ValueError, match=r"not certain that it is the loss: return \(loss, logits"):
        scored(ValueHead(extra=0.1).double(), [BATCH])


def test_logits_alone_do_not_tell_which_token_they_predict():
    """Guards a language model that is read as one that labels its own tokens."""
    model = LogitsOnly().double()
    for batch in (BATCH, (IDS, IDS)):
        with pytest.raises(ValueError, match=r"this token or the next: .* pass a loss_fn"):
            scored(model, [batch])

    def loss_fn(logits, batch):
        by_token = F.cross_entropy(logits[:, :-1].mT, batch["labels"][:, 1:], reduction="none")
        return by_token.mean(1)

    def loss_of_row(model, row):
        return loss_fn(model(row["input_ids"]), row)[0]

    expected = naive_scores(model, ROWS, loss=loss_of_row)
    assert_scores_close(scored(model, [BATCH], loss_fn=loss_fn), expected)


def test_logits_alone_with_other_labels_label_the_tokens():
    """Guards against refusing to score what labels the tokens of a text."""
    model = LogitsOnly().double()
    rows = [{**row, "labels": (row["labels"] * 7) % 40} for row in ROWS]
    batch = {key: torch.cat([row[key] for row in rows]) for key in BATCH}

    def loss(model, row):
        return F.cross_entropy(model(row["input_ids"])[0], row["labels"][0])

    assert_scores_close(scored(model, [batch]), naive_scores(model, rows, loss=loss))
