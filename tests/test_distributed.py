"""Scoring and training in several processes, which gloo joins on this machine."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from fish_tuning import (
    FishConfig,
    apply_mask,
    calculate_fisher_information,
    get_fish_model,
    get_mask,
    remove_mask,
    score_with_perturbed_b,
)
from fish_tuning.sparse import masked_parameters

from .models import batches_of, examples_for, pad, tiny_bert, tiny_llama, with_lora
from .processes import in_processes

ROOT = Path(__file__).parents[1]


def lora_bert(**config):
    return with_lora(tiny_bert(**config), init_lora_weights=False, lora_dropout=0.0)


def scored(model, loader, **options):
    return calculate_fisher_information(model, loader, progress=False, **options)


def assert_equal_scores(actual, expected, rtol=1e-6):
    """Entry by entry; every score is a sum of squares, in which nothing cancels."""
    assert list(actual) == list(expected)
    for name, score in expected.items():
        torch.testing.assert_close(actual[name], score, rtol=rtol, atol=0, msg=name)


def assert_identical(scores):
    for other in scores[1:]:
        assert list(other) == list(scores[0])
        assert all(torch.equal(other[name], score) for name, score in scores[0].items())


# Scores


def score(rank, model, loader, options):
    return scored(model, loader, **options)


@pytest.mark.parametrize(
    "count", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_scores_are_those_of_one_process(count, tmp_path):
    """Guards against parts that count twice or not at all, and squares of other sums."""
    model = lora_bert()
    # 5 batches, the last of 1 example.
    batches = batches_of(examples_for(model, 13), 3)
    scores = in_processes(count, tmp_path / "a", score, model, batches, {})
    assert_identical(scores)
    assert_equal_scores(scores[0], scored(model, batches))
