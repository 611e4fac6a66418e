"""What a batch is: how many examples it has, and taking some of them."""

import pytest
import torch
from transformers import BatchEncoding

from fish_tuning.scoring.inputs.batches import batch_size, take


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        ({"input_ids": torch.zeros(3, 7), "labels": torch.zeros(3)}, 3),
        ({"pixels": torch.zeros(1, 7), "labels": torch.zeros(3)}, 3),
        ({"scale": torch.tensor(2.0), "x": torch.zeros(4, 2)}, 4),
        ({"names": ["a", "b"], "x": torch.zeros(4, 2)}, 4),
        ([torch.zeros(5, 2), torch.zeros(5)], 5),
        ((torch.zeros(2, 2), "text"), 2),
        (BatchEncoding({"input_ids": torch.zeros(6, 2)}), 6),
    ],
)
def test_batch_size(batch, size):
    """Guards against counting by a tensor that is not by example."""
    assert batch_size(batch) == size


@pytest.mark.parametrize(
    ("batch", "named"),
    [({"text": "a", "n": torch.tensor(1)}, "text: str, n: \\(\\)"), (["a"], "str")],
)
def test_batch_without_tensors_is_refused(batch, named):
    """Guards against an obscure error, far from the loader."""
    with pytest.raises(ValueError, match=rf"no tensor in a calibration batch \({named}\)"):
        batch_size(batch)


def test_take_slices_what_is_by_example():
    """Guards against cutting what all examples share, or leaving whole what is theirs."""
    batch = {
        "labels": torch.arange(4),
        "x": torch.arange(8).view(4, 2),
        "texts": ["a", "b", "c", "d"],
        "shared": torch.arange(3),
        "scalar": torch.tensor(1.0),
        "flag": True,
    }
    part = take(batch, slice(1, 3))
    assert part["labels"].tolist() == [1, 2]
    assert part["x"].tolist() == [[2, 3], [4, 5]]
    assert part["texts"] == ["b", "c"]
    assert part["shared"] is batch["shared"]
    assert part["scalar"] is batch["scalar"]
    assert part["flag"] is True
    x, y = take((torch.arange(4), torch.arange(4)), slice(2, 4))
    assert x.tolist() == y.tolist() == [2, 3]


def test_positions_of_m_rope_are_divided_by_example():
    """Guards against taking time, height and width for examples."""
    positions = torch.arange(24).view(3, 4, 2)
    part = take({"input_ids": torch.zeros(4, 2), "position_ids": positions}, slice(1, 2))
    assert torch.equal(part["position_ids"], positions[:, 1:2])


def test_rows_of_no_known_example_are_refused():
    """Guards against giving patches to the wrong example."""
    batch = {"input_ids": torch.zeros(2, 4), "pixel_values": torch.zeros(9, 3)}
    with pytest.raises(ValueError, match=r"pixel_values has 9 rows for 2 examples.*batch_size=1"):
        take(batch, slice(0, 1))
