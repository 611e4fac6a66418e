"""Sharing a budget out, against the level that water would stand at and closed forms."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fish_tuning.selection.criteria import random_scores, reversed_scores
from fish_tuning.selection.select import create_mask_from_fisher
from fish_tuning.selection.shares import proportional, shares_of

A, B = "m.0.lora_A.default.weight", "m.0.lora_B.default.weight"
A2, B2 = "m.1.lora_A.default.weight", "m.1.lora_B.default.weight"
EMBEDDING_A, EMBEDDING_B = "e.lora_embedding_A.default", "e.lora_embedding_B.default"


def quotas(scores, k, scope="adaptive"):
    """Entries by name."""
    sizes = {name: tensor.numel() for name, tensor in scores.items()}
    return {name: quota for (name,), quota in shares_of(scores, sizes, k, scope)}


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_proportional_is_a_water_level(data):
    """Guards proportion, room and sum: all but the full ones stand at one multiple of weight."""
    room = data.draw(st.dictionaries(st.text(max_size=2), st.integers(0, 50), min_size=1))
    weights = {name: data.draw(st.just(0.0) | st.floats(1e-3, 1e3)) for name in room}
    k = data.draw(st.integers(0, sum(room.values())))
    found = proportional(k, weights, room)
    assert sum(found.values()) == k
    assert all(0 <= found[name] <= room[name] for name in room)

    weighty = sum(room[name] for name in room if weights[name])
    if k >= weighty:
        assert all(found[name] == room[name] for name in room if weights[name])
        weights, k = {name: room[name] * (not weights[name]) for name in room}, k - weighty
        room = {name: room[name] * bool(weights[name]) for name in room}
    low, high = 0.0, max((room[n] / weights[n] for n in room if weights[n]), default=0.0)
    for _ in range(200):
        level = (low + high) / 2
        poured = sum(min(room[n], level * weights[n]) for n in room)
        low, high = (level, high) if poured < k else (low, level)
    for name in room:
        if weights[name]:
            assert abs(found[name] - min(room[name], high * weights[name])) < 1 + 1e-6


def test_adaptive_is_size_times_root_of_the_mean():
    """Guards the closed form, and that scores of A and of B are never compared."""
    scores = {A: torch.full((4, 30), 9.0), A2: torch.full((4, 30), 36.0)}
    scores |= {B: torch.full((60, 4), 1e-6), B2: torch.full((20, 4), 1e-6)}
    assert quotas(scores, 112) == {A: 16, A2: 32, B: 48, B2: 16}
    assert quotas(reversed_scores(scores), 112) == {A: 32, A2: 16, B: 48, B2: 16}
    assert quotas({**scores, B2: torch.zeros(20, 4)}, 112) == {A: 16, A2: 32, B: 64, B2: 0}
    assert quotas(reversed_scores({**scores, B2: torch.zeros(20, 4)}), 112)[B2] == 26


def test_adaptive_bounds_every_density():
    """Guards the bound, the root of half the density of all, and who gets what is beyond it."""
    scores = {A: torch.full((4, 30), 9.0), A2: torch.full((4, 30), 36.0)}
    assert quotas(scores, 60) == {A: 20, A2: 40}  # of at most 120 sqrt(0.125) = 42.4
    assert quotas(scores, 96) == {A: 42, A2: 54}  # of at most 120 sqrt(0.2) = 53.7
    assert quotas(scores, 120) == {A: 60, A2: 60}
    assert quotas(scores, 200) == {A: 100, A2: 100}


def test_adaptive_without_information_is_by_size():
    """Guards scores that say nothing about the tensors: all zero, all equal, drawn at random."""
    shapes = {A: (4, 300), A2: (4, 100), B: (60, 4), B2: (20, 4)}
    for scores in (
        {name: torch.zeros(shape) for name, shape in shapes.items()},
        {name: torch.ones(shape) for name, shape in shapes.items()},
    ):
        assert quotas(scores, 192) == {A: 120, A2: 40, B: 24, B2: 8}
    drawn = quotas(random_scores(shapes, 0), 480)
    assert drawn == pytest.approx({A: 300, A2: 100, B: 60, B2: 20}, rel=0.1)


def test_adaptive_keeps_embeddings_apart():
    """Guards the side that starts at zero: an embedding's A is scored like a linear layer's B."""
    scores = {A: torch.full((4, 10), 1e6), EMBEDDING_A: torch.ones(4, 10)}
    scores |= {B: torch.ones(10, 4), EMBEDDING_B: torch.full((10, 4), 1e6)}
    assert set(quotas(scores, 80).values()) == {20}


def test_adaptive_scores_of_both_signs():
    """Guards monotony for scores of any criterion: what is negative comes last."""
    scores = {"u": torch.full((10,), -5.0), "v": torch.full((10,), 4.0), "w": torch.ones(10)}
    assert quotas(scores, 6) == {"u": 0, "v": 4, "w": 2}
    assert quotas(scores, 13) == {"u": 3, "v": 5, "w": 5}


def test_adaptive_takes_what_is_empty():
    """Guards a tensor without entries, which has no mean."""
    scores = {"u": torch.empty(0, 3), "w": torch.rand(4)}
    assert quotas(scores, 3) == {"u": 0, "w": 3}


def test_balanced_shares():
    """Guards half to each side, the odd one to B, and what one side cannot hold to the other."""

    def shares(k, **sizes):
        names = {"A": "m.lora_A.default.weight", "B": "m.lora_embedding_B.default", "x": "norm"}
        scores = {names[kind]: torch.rand(size) for kind, size in sizes.items()}
        mask = create_mask_from_fisher(scores, num_trainable=k, scope="balanced")
        return {kind: int(mask[names[kind]].sum()) for kind in sizes}

    assert shares(9, A=20, B=20) == {"A": 4, "B": 5}
    assert shares(9, A=2, B=20) == {"A": 2, "B": 7}
    assert shares(9, A=20, B=2) == {"A": 7, "B": 2}
    assert shares(11, A=20, B=20, x=20) == {"A": 4, "B": 4, "x": 3}
    assert shares(11, A=20, B=20, x=1) == {"A": 5, "B": 5, "x": 1}
    assert shares(5, B=20) == {"B": 5}


def test_balanced_without_lora_is_global():
    """A model without LoRA has one kind of tensor; its share must be the whole budget."""
    scores = {"w": torch.rand(5, 7), "v": torch.rand(11)}
    balanced = create_mask_from_fisher(scores, num_trainable=13, scope="balanced")
    assert balanced == create_mask_from_fisher(scores, num_trainable=13)
