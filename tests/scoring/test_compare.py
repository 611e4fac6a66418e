"""How far two sets of scores agree."""

import math

import pytest
import torch

from fish_tuning import compare_scores

spearmanr = pytest.importorskip("scipy.stats").spearmanr

NAMES = [
    f"base_model.model.layer.{layer}.query.lora_{side}.default.weight"
    for layer in (0, 1)
    for side in "AB"
]


def random_scores(seed, names=NAMES):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(6, 5, generator=generator) for name in names}


def test_by_layer_and_side():
    """Guards overlap and rank correlation against scipy's and against sets, ties included."""
    first, second = random_scores(0), random_scores(1)
    second = {n: (0.5 * first[n] + 0.5 * t).mul(8).round() for n, t in second.items()}
    found = compare_scores(first, second, keep_ratio=0.2)
    assert [(a.layer, a.side) for a in found] == [
        ("all", "A"),
        ("all", "B"),
        ("layer.0", "A"),
        ("layer.0", "B"),
        ("layer.1", "A"),
        ("layer.1", "B"),
    ]
    for agreement in found:
        names = [
            n
            for n in NAMES
            if f"lora_{agreement.side}" in n and agreement.layer in ("all", n[17:24])
        ]
        a, b = (torch.cat([s[n].flatten() for n in names]).numpy() for s in (first, second))
        assert agreement.num_entries == a.size
        assert math.isclose(agreement.rank_correlation, spearmanr(a, b)[0], abs_tol=1e-12)
        k = round(0.2 * a.size)
        best = [set((-s).argsort(kind="stable")[:k]) for s in (a, b)]
        assert agreement.overlap == len(best[0] & best[1]) / k


def test_extremes():
    """Guards equal, opposite and constant scores."""
    scores = {"w": torch.arange(20.0).view(4, 5)}
    for other, overlap, correlation in (
        (scores, 1.0, 1.0),
        ({"w": -scores["w"]}, 0.0, -1.0),
        ({"w": torch.ones(4, 5)}, 0.0, math.nan),
    ):
        [agreement] = [a for a in compare_scores(scores, other) if a.layer == "all"]
        assert agreement.overlap == overlap
        assert agreement.rank_correlation == pytest.approx(correlation, nan_ok=True)


@pytest.mark.parametrize(
    ("first", "second", "ratio", "message"),
    [
        ({"a": torch.ones(2)}, {"b": torch.ones(2)}, 0.1, "2 are missing .*or differ in shape"),
        ({"a": torch.ones(2)}, {"a": torch.ones(3)}, 0.1, r"1 are missing.*\(a\)"),
        ({"a": torch.ones(2)}, {"a": torch.ones(2)}, 0, r"keep_ratio=0 is not in \(0, 1\]"),
    ],
)
def test_refused(first, second, ratio, message):
    """Guards against numbers that compare different things."""
    with pytest.raises(ValueError, match=message):
        compare_scores(first, second, keep_ratio=ratio)
