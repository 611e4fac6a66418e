"""FishMask: the mapping, its counts, its summary."""

import pytest
import torch

from fish_tuning.mask import FishMask

PREFIX = "base_model.model."


def test_mapping_and_counts(mask):
    """Guards against counts that leave out tensors left dense, and an order that is not the given
    one."""
    assert len(mask) == 6 and next(iter(mask)).endswith("lora_B.default.weight")
    assert mask.num_entries == 15 + 15 + 8 + 0 + 1 + 12
    assert mask.num_trainable == sum(sum(t.flatten().tolist()) for t in mask.values())
    assert mask.num_trainable > 12
    assert mask.density == mask.num_trainable / 51
    assert repr(mask) == f"FishMask({mask.num_trainable} of 51 in 6 tensors)"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bfloat16, torch.float32])
def test_zeros_and_ones_of_any_dtype(dtype):
    """Guards masks as the first implementation makes them, float32 zeros and ones."""
    bits = torch.tensor([[0, 1, 1]])
    mask = FishMask({"a": bits.to(dtype)})
    assert mask["a"].dtype == torch.bool and mask["a"].tolist() == [[False, True, True]]


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({}, "at least one tensor"),
        ({"m.w": torch.tensor([0.0, 0.5, 2.0])}, r"mask of m.w .* 2 of its 3 entries"),
        ({"m.w": torch.tensor([1.0, float("nan")])}, "mask of m.w .* 1 of its 2 entries"),
        ({"m.w": [True]}, "'m.w' maps to a list"),
        ({3: torch.ones(2)}, "3 maps to a Tensor"),
    ],
)
def test_not_a_mask(tensors, match):
    """Guards against scores or other values taken for a mask."""
    with pytest.raises(ValueError, match=match):
        FishMask(tensors)


@pytest.mark.parametrize("provenance", [{"a": torch.ones(1)}, {"a": float("nan")}])
def test_provenance_must_fit_in_json(provenance):
    """Guards against a mask that cannot be saved after hours of training."""
    with pytest.raises(ValueError, match="provenance of a FishMask must fit in JSON"):
        FishMask({"a": torch.ones(1)}, provenance=provenance)


def test_equality():
    """Guards against an equality that misses a name, a shape or a bit."""
    bits = torch.tensor([True, False, True, False])
    mask = FishMask({"a": bits, "b": bits})
    assert mask == FishMask({"b": bits.float(), "a": bits.clone()}, provenance={"x": 1})
    assert mask != FishMask({"a": bits})
    assert mask != FishMask({"a": bits, "c": bits})
    assert mask != FishMask({"a": bits, "b": bits.view(2, 2)})
    assert mask != FishMask({"a": bits, "b": ~bits})
    assert mask != {"a": bits, "b": bits}


def test_summary():
    """Guards against a summary with wrong sums, split layers or ragged columns."""
    mask = FishMask(
        {
            PREFIX + "bert.encoder.layer.0.query.lora_A.w": torch.arange(2000) < 1500,
            PREFIX + "bert.encoder.layer.0.query.lora_B.w": torch.arange(2000) < 0,
            PREFIX + "bert.encoder.layer.10.query.lora_A.w": torch.arange(10) < 1,
            PREFIX + "classifier.dense.weight": torch.ones(2, 2),
            PREFIX + "classifier.bias": torch.ones(2),
        }
    )
    assert mask.summary().splitlines() == [
        "1,507 of 4,016 entries selected (37.52%) in 5 tensors",
        "",
        "layer                  selected  entries  density",
        "bert.encoder.layer.0      1,500    4,000   37.50%",
        "bert.encoder.layer.10         1       10   10.00%",
        "classifier                    6        6  100.00%",
        "",
        "tensor (after base_model.model.)      selected  entries  density",
        "bert.encoder.layer.0.query.lora_A.w      1,500    2,000   75.00%",
        "bert.encoder.layer.0.query.lora_B.w          0    2,000    0.00%",
        "bert.encoder.layer.10.query.lora_A.w         1       10   10.00%",
        "classifier.dense.weight                      4        4  100.00%",
        "classifier.bias                              2        2  100.00%",
    ]


def test_summary_of_a_lone_tensor():
    """Guards against a common prefix that swallows the name, and a division by no entries."""
    mask = FishMask({"score.weight": torch.ones(0)})
    assert mask.density == 0
    lines = mask.summary().splitlines()
    assert lines[0] == "0 of 0 entries selected (0.00%) in 1 tensors"
    assert lines[3].split() == ["score", "0", "0", "0.00%"]
    assert lines[6].split() == ["weight", "0", "0", "0.00%"]
