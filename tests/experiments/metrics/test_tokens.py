"""Loss, perplexity and accuracy per token against a plain loop."""

import math

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from fish_tuning.experiments.metrics.tokens import compute_token_metrics, token_sums


def plain_loop(logits, labels):
    """Negative log-likelihood, right predictions and tokens of each row, one token at a time."""
    sums = []
    for row, targets in zip(logits, labels, strict=True):
        total = right = tokens = 0
        for place in range(len(targets) - 1):
            target = int(targets[place + 1])
            if target != -100:
                total -= float(row[place].log_softmax(-1)[target])
                right += int(row[place].argmax()) == target
                tokens += 1
        sums.append((total, right, tokens))
    return torch.tensor(sums)


def evaluated(sums):
    return compute_token_metrics(EvalPrediction(np.asarray(sums), np.asarray(sums)[:, 2]))


def test_sums_are_those_of_a_plain_loop():
    """Guards the shift by one, ignored tokens, and rows without a token."""
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 6, 9), torch.randint(9, (4, 6))
    labels[0, :3] = labels[1, 4:] = labels[2] = -100
    expected = plain_loop(logits, labels)
    torch.testing.assert_close(token_sums(logits, labels), expected, rtol=1e-5, atol=1e-5)


def test_every_token_has_the_same_weight():
    """Guards against the mean of the rows' means, which weighs short rows more."""
    found = evaluated([(6.0, 1, 2), (1.0, 4, 4)])
    loss = 7 / 6
    assert found == pytest.approx(
        {"loss": loss, "perplexity": math.exp(loss), "token_accuracy": 5 / 6}
    )


def test_divergence_is_told():
    """Guards a perplexity of NaN, and one that does not fit into a float."""
    with pytest.raises(ValueError, match="the loss is not finite: training diverged"):
        evaluated([(math.nan, 0, 1)])
    assert evaluated([(1e6, 0, 1)])["perplexity"] == math.inf
