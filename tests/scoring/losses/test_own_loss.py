"""A model's own loss beside the known likelihoods: value, gradient, and what is kept meanwhile."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from fish_tuning.scoring.losses.likelihood import SingleLabel, Tokens
from fish_tuning.scoring.losses.own_loss import DIRECTIONS, OwnLoss

KINDS = [Tokens(shifted=False), Tokens(shifted=True)]
CLASSES = [DIRECTIONS - 1, 40 * DIRECTIONS]


def some_logits(classes, scale=1.0, tokens=6):
    generator = torch.Generator().manual_seed(0)
    leaf = (scale * torch.randn(1, tokens, classes, generator=generator)).requires_grad_()
    labels = torch.randint(0, classes, (1, tokens), generator=generator)
    return leaf * 1, labels


def loss_of(logits, labels, shifted, **options):
    x, y = (logits[:, :-1], labels[:, 1:]) if shifted else (logits, labels)
    return F.cross_entropy(x.flatten(0, 1), y.flatten(), **options)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-9], ids=["some logits", "logits near 0"])
def test_the_right_one_agrees(classes, shifted, scale):
    """Guards both answers; near 0, all losses are log C, and only the gradients differ."""
    logits, labels = some_logits(classes, scale)
    own = loss_of(logits, labels, shifted)
    assert OwnLoss(own, logits, labels, KINDS).agreeing() == [Tokens(shifted)]


@pytest.mark.parametrize("classes", CLASSES)
def test_one_token_that_counts_more_is_noticed(classes):
    """Guards against directions that miss a difference in a single token."""
    logits, labels = some_logits(classes, 1e-9, tokens=40)
    weights = torch.ones(40)
    weights[7] = 1.2
    own = (loss_of(logits, labels, False, reduction="none") * weights).sum() / weights.sum()
    assert OwnLoss(own, logits, labels, KINDS).agreeing() == []


def test_a_loss_of_something_else_is_compared_by_value():
    """Guards losses that are not computed from the logits that the model returns."""
    leaf = torch.randn(1, 9, requires_grad=True)
    labels = torch.tensor([2])
    own = F.cross_entropy(leaf, labels)
    logits = leaf * 1
    assert OwnLoss(own, logits, labels, [SingleLabel()]).agreeing() == [SingleLabel()]
    assert OwnLoss(own + 1, logits, labels, [SingleLabel()]).agreeing() == []


def test_logits_are_let_go():
    """Guards the memory of a large vocabulary: nothing of the logits' size is kept."""
    logits, labels = some_logits(CLASSES[1])
    storage = weakref.ref(logits.untyped_storage())
    own_loss = OwnLoss(loss_of(logits, labels, True), logits, labels, KINDS)
    del logits
    gc.collect()
    assert storage() is None
    assert own_loss.agreeing() == [Tokens(shifted=True)]
