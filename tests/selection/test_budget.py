"""The pool and k, and budgets that are not possible."""

import math

import pytest
import torch

from fish_tuning.selection.budget import pool_and_quota
from fish_tuning.selection.select import create_mask_from_fisher


def test_pool_and_quota():
    """Guards against counts of the head as part of the pool, and a pool in another order than the
    masks."""
    entries = {"b": 30, "head.weight": 5, "a": 10}
    assert pool_and_quota(entries, 0.5, "^head", None) == ({"a": 10, "b": 30}, 20)
    assert pool_and_quota(entries, None, ["^head"], 12) == ({"a": 10, "b": 30}, 7)
    assert pool_and_quota(entries, 1e-9, None, None)[1] == 1


@pytest.mark.parametrize("keep_ratio", [0, -0.1, 1.0001, math.nan, math.inf, True, "0.5"])
def test_keep_ratio_out_of_range(keep_ratio):
    """Guards against a ratio that would select nothing, everything or fail far away."""
    with pytest.raises(ValueError, match=r"keep_ratio=.* is not a number in \(0, 1\].* 10 entries"):
        create_mask_from_fisher({"a": torch.rand(10)}, keep_ratio)


@pytest.mark.parametrize("num_trainable", [5, 16, 0, -1, 7.0, math.nan])
def test_num_trainable_out_of_range(num_trainable):
    """Guards against a budget that the dense tensors already use up, or that the pool cannot
    fill."""
    scores = {"a": torch.rand(10), "head": torch.rand(5)}
    with pytest.raises(ValueError, match=r"num_trainable=.* must be an integer from 6 to 15: 5 "):
        create_mask_from_fisher(scores, names_to_exclude="head", num_trainable=num_trainable)


def test_true_is_not_a_count():
    """Guards against num_trainable=True, which Python takes for 1."""
    with pytest.raises(ValueError, match="num_trainable=True must be an integer from 1 to 10"):
        create_mask_from_fisher({"a": torch.rand(10)}, num_trainable=True)


@pytest.mark.parametrize("budget", [{}, {"keep_ratio": 0.5, "num_trainable": 3}])
def test_one_budget(budget):
    """Guards against a default or a precedence that nobody asked for."""
    with pytest.raises(ValueError, match="Give exactly one of keep_ratio"):
        create_mask_from_fisher({"a": torch.rand(10)}, **budget)
