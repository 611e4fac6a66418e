"""Scores by chance, by magnitude, and reversed ones."""

import torch

from fish_tuning.selection.criteria import magnitude_scores, random_scores, reversed_scores
from fish_tuning.selection.select import create_mask_from_fisher


def test_random_scores():
    """Guards against draws that depend on the other tensors, or on nothing, or are not uniform."""
    both = random_scores({"a": (100, 100), "b": torch.empty(100, 100)}, seed=1)
    assert torch.equal(random_scores({"b": (100, 100)}, seed=1)["b"], both["b"])
    assert not torch.equal(both["a"], both["b"])
    assert not torch.equal(random_scores({"b": (100, 100)}, seed=2)["b"], both["b"])
    assert torch.histc(both["a"], 10, 0, 1).sub(1000).abs().max() < 200
    before = torch.random.get_rng_state()
    random_scores({"a": (3,)}, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_reversed_scores():
    """Guards against a reversed arm that does not pick the least important entries."""
    scores = {"a": torch.tensor([3.0, 0.0, 2.0]), "b": torch.tensor([1.0])}
    mask = create_mask_from_fisher(reversed_scores(scores), num_trainable=2)
    assert mask["a"].tolist() == [False, True, False] and mask["b"].tolist() == [True]


def test_magnitude_scores():
    """Guards against signs that count, frozen parameters that are scored, and graphs kept alive."""
    model = torch.nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    torch.nn.init.constant_(model.weight, -2.0)
    scores = magnitude_scores(model)
    assert {name: tensor.tolist() for name, tensor in scores.items()} == {"weight": [[2.0, 2.0]]}
    assert not scores["weight"].requires_grad
    assert magnitude_scores({"b": torch.tensor([-1.0])})["b"].item() == 1.0
