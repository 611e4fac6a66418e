"""Selecting from LoRA's pairs by rank and by feature, against sorting units of entries."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fish_tuning.selection.criteria import random_scores
from fish_tuning.selection.select import create_mask_from_fisher
from fish_tuning.selection.shares import shares_of


@st.composite
def pairs(draw):
    """LoRA pairs, one of an embedding and one of a convolution, and a norm; scores without ties."""
    rank = draw(st.integers(1, 4))
    wide, high = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    shapes = {
        "a.lora_A.default.weight": (rank, wide),
        "a.lora_B.default.weight": (high, rank),
        "b.lora_A.default.weight": (rank, high),
        "b.lora_B.default.weight": (wide, rank),
        "c.lora_embedding_A.default": (rank, 7),
        "c.lora_embedding_B.default": (wide, rank),
        "d.lora_A.default.weight": (rank, wide, 3, 3),
        "d.lora_B.default.weight": (high, rank, 1, 1),
        "norm": (4,),
    }
    keep = draw(st.sets(st.sampled_from("abcd"), min_size=1)) | {"n"}
    shapes = {name: shape for name, shape in shapes.items() if name[0] in keep}
    return random_scores(shapes, draw(st.integers(0, 99)))


@settings(max_examples=25, deadline=None)
@given(pairs(), st.sampled_from(["features", "adaptive"]))
def test_features_are_dealt_to_the_ranks(scores, scope):
    """Guards both scopes, for every k: the best features first, each rank in its turn."""
    sizes = {name: scores[name].numel() for name in sorted(scores)}
    for k in range(1, sum(sizes.values()) + 1):
        mask = create_mask_from_fisher(scores, num_trainable=k, scope=scope)
        quotas = {name: quota for (name,), quota in shares_of(scores, sizes, k, scope)}
        for name, bits in mask.items():
            quota = quotas[name]
            if name == "norm":
                best = set(scores[name].argsort(descending=True)[:quota].tolist())
                assert set(bits.nonzero().flatten().tolist()) == best
                continue
            is_a = "_A" in name

            def of_rank(tensor, j, is_a=is_a):
                return (tensor[j] if is_a else tensor[:, j]).flatten()

            ranks = len(bits) if is_a else bits.shape[1]
            worth = sum(of_rank(scores[name], j) for j in range(ranks))
            order = sorted(range(len(worth)), key=lambda f: -float(worth[f]))
            dealt = [
                ((place + turn) % ranks, f)
                for turn in range(ranks)
                for place, f in enumerate(order)
            ]
            chosen = {
                (j, f) for j in range(ranks) for f in range(len(worth)) if of_rank(bits, j)[f]
            }
            assert chosen == set(dealt[:quota]) and len(dealt) == bits.numel()


def test_features_without_scores_are_reported(caplog):
    """Guards A at LoRA's start: no feature has a score, and position decides."""
    scores = {
        "m.lora_A.default.weight": torch.zeros(2, 6),
        "m.lora_B.default.weight": torch.rand(6, 2),
    }
    create_mask_from_fisher(scores, num_trainable=6, scope="features")
    assert "6 entries tie at score 0" in caplog.text


@pytest.mark.parametrize("scope", ["features", "adaptive"])
def test_a_matrix_without_entries(scope):
    """Guards ranks that hold nothing, as a pruned adapter may have."""
    scores = {
        "m.lora_A.default.weight": torch.zeros(0, 6),
        "m.lora_B.default.weight": torch.zeros(6, 0),
        "n.lora_A.default.weight": torch.rand(2, 6),
        "n.lora_B.default.weight": torch.rand(6, 2),
    }
    assert create_mask_from_fisher(scores, num_trainable=6, scope=scope).num_trainable == 6
