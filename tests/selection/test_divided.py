"""Exact k from scores of which each process holds some rows."""

import logging
import math
from typing import get_args

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fish_tuning import create_mask_from_fisher, create_ranks_from_fisher, reversed_scores
from fish_tuning.config import Scope
from fish_tuning.parts import Part
from fish_tuning.scoring.compare import compare_scores
from fish_tuning.selection import exact_sums, ranking
from tests.parallel import error_of
from tests.processes import in_processes

SHAPES = {
    "layers.0.q.lora_A.default.weight": (4, 15),
    "layers.0.q.lora_B.default.weight": (9, 4),
    "layers.0.k.lora_A.default.weight": (3, 15),
    "layers.0.k.lora_B.default.weight": (13, 3),
    "embed.lora_embedding_A.default": (4, 31),
    "embed.lora_embedding_B.default": (10, 4),
    "layers.0.weight": (7, 5, 3),
    "layers.0.norm.weight": (9,),
    "layers.1.norm.weight": (1,),
    "layers.1.weight": (2, 40),
    "head.modules_to_save.weight": (3, 5),
    "whole": (6, 4),
}
KINDS = ("distinct", "ties", "zeros", "reversed", "double")


def scores_of(kind):
    generator = torch.Generator().manual_seed(KINDS.index(kind))

    def draw(shape):
        scores = torch.rand(shape, generator=generator, dtype=torch.float64) ** 8
        if kind in ("ties", "zeros"):
            scores = (4 * scores).round() / (1 if kind == "zeros" else 3)
        return scores if kind == "double" else scores.float()

    scores = {name: draw(shape) for name, shape in SHAPES.items()}
    return reversed_scores(scores) if kind == "reversed" else scores


def divided(scores):
    """The scores in parts, all but one tensor."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return {
        name: score if name == "whole" else distribute_tensor(score, mesh, [Shard(0)])
        for name, score in scores.items()
    }


BUDGETS = (0.001, 0.05, 0.5, 0.99, 1.0)


def masks_of(scores, budgets):
    return {
        (scope, budget): create_mask_from_fisher(
            scores, budget, names_to_exclude="modules_to_save", scope=scope
        )
        for scope in get_args(Scope)
        for budget in budgets
    }


def select(rank, kinds, budgets):
    logging.disable(logging.WARNING)
    # So that a tensor takes several chunks.
    ranking.CPU_CHUNK = exact_sums._CHUNK = 16
    # So that samples are taken.
    ranking.FEWEST_SAMPLED, ranking.MARGIN, ranking.MOST_BETWEEN = 64, 0.5, 1
    found = {}
    for kind in kinds:
        scores = divided(scores_of(kind))
        found[kind] = masks_of(scores, budgets), create_ranks(scores)
    broken = scores_of("distinct")
    broken["layers.0.weight"][0, 0, 0] = math.nan
    other = divided(scores_of("ties"))
    agreement = compare_scores(divided(scores_of("distinct")), other, keep_ratio=0.1)
    return found, error_of(create_mask_from_fisher, divided(broken), 0.1), agreement


def create_ranks(scores):
    pairs = {name: score for name, score in scores.items() if ".q.lora" in name}
    try:
        return create_ranks_from_fisher(pairs, 200)
    except ValueError as error:
        return str(error)


def assert_masks_are_those_of_complete_scores(count, folder, kinds, budgets):
    results = in_processes(count, folder, select, kinds, budgets)
    for found, error, agreement in results:
        for kind, (masks, ranks) in found.items():
            scores = scores_of(kind)
            for settings, expected in masks_of(scores, budgets).items():
                mask = masks[settings]
                assert list(mask) == list(expected), (kind, settings)
                assert mask == expected, (kind, settings)
                assert mask.provenance == expected.provenance, (kind, settings)
            assert ranks == create_ranks(scores), kind
        assert error[0] == "ValueError" and "layers.0.weight (1 of 105)" in error[1]
        expected = compare_scores(scores_of("distinct"), scores_of("ties"), keep_ratio=0.1)
        assert str(agreement) == str(expected)


def test_masks_are_those_of_complete_scores(tmp_path):
    """Guards the exact count, shares and positions of ties when scores are in two processes."""
    assert_masks_are_those_of_complete_scores(2, tmp_path / "a", KINDS, BUDGETS)


@pytest.mark.slow
def test_masks_in_four_processes(tmp_path):
    """Guards tensors of which some processes hold nothing."""
    assert_masks_are_those_of_complete_scores(4, tmp_path / "a", ("ties", "double"), (0.05, 0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_exact_sums(dtype):
    """Guards against sums whose last bits depend on the order of addition."""
    generator = torch.Generator().manual_seed(0)
    for exponent in (0, -300):
        scores = torch.randn(999, generator=generator, dtype=torch.float64)
        scores *= 10.0 ** torch.randint(-12, 4, (999,), generator=generator)
        scores = (scores * 10.0**exponent).to(dtype)
        expected = math.fsum(scores.double().tolist())
        assert exact_sums.exact_sums([Part(scores), Part(scores.flip(0))]) == [expected] * 2
    assert exact_sums.exact_sums([Part(scores[:0]), Part(scores[:0].sum())]) == [0, 0]
