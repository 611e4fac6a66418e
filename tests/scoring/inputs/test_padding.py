"""Padding that need not be computed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fish_tuning.scoring.inputs.padding import parts_by_length, without_padding


def padded(lengths, width=None):
    """A batch padded on the right; each token is its example's number."""
    width = max(lengths) if width is None else width
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    rows = torch.arange(len(lengths)).unsqueeze(1)
    return {"input_ids": rows * mask, "attention_mask": mask.long(), "labels": rows.squeeze(1)}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 3), st.integers(1, 5))
def test_parts_hold_every_example_once(lengths, extra, size):
    """Guards lost, doubled or misnumbered examples, and parts wider than they need to be."""
    batch = padded(lengths, max(lengths) + extra)
    numbers = [100 + i for i in range(len(lengths))]
    seen = []
    for part, of_part in parts_by_length(batch, numbers, size):
        part = without_padding(part)
        assert [100 + int(label) for label in part["labels"]] == list(of_part)
        of_lengths = [lengths[number - 100] for number in of_part]
        assert part["attention_mask"].sum(1).tolist() == of_lengths
        assert part["input_ids"].shape == (len(of_part), max(of_lengths))
        assert torch.equal(part["input_ids"].amax(1), part["labels"])
        seen += of_part
    assert sorted(seen) == numbers


@pytest.mark.parametrize(
    "change",
    [
        {"attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])},
        {"attention_mask": torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0]])},
        {"attention_mask": torch.ones(2, 4)},
        {"attention_mask": None},
        {"attention_mask": torch.ones(2, 1, 4, 4)},
        {"labels": torch.tensor([[1, 1, 7, -100], [1, -100, -100, -100]])},
        {"bbox": torch.ones(2, 4, 4)},
        {"scores": torch.ones(2, 4)},
        {"shared": torch.ones(3)},
        {"texts": ["a", "b"]},
    ],
    ids=[
        "left",
        "holes",
        "no padding",
        "no mask",
        "4-d mask",
        "labelled padding",
        "unknown by token",
        "as many columns by chance",
        "not by example",
        "not a tensor",
    ],
)
def test_batches_that_are_left_alone(change):
    """Guards padding that means something, and entries that would no longer fit."""
    batch = {**padded([2, 1], 4), **change}
    assert without_padding(batch) is batch
    assert list(parts_by_length(batch, [5, 6], 1)) == [(batch, [5, 6])]


def test_labels_and_images_are_cut_as_they_should_be():
    """Guards labels by token that keep their padding, and other entries that lose columns."""
    batch = padded([2, 1], 4)
    batch["labels"] = torch.tensor([[1, 2, -100, -100], [3, -100, -100, -100]])
    batch["pixel_values"] = torch.ones(2, 3, 5, 5)
    part = without_padding(batch)
    assert part["labels"].tolist() == [[1, 2], [3, -100]]
    assert part["pixel_values"] is batch["pixel_values"]


def test_what_is_cut_can_be_viewed():
    """Guards models that flatten their labels with `view`, which fails on a slice of columns."""
    batch = padded([2, 1], 4)
    batch["labels"] = torch.full((2, 4), -100)
    part = without_padding(batch)
    assert part["labels"].view(-1).shape == part["input_ids"].view(-1).shape == (4,)
