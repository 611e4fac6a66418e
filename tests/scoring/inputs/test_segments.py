"""Where examples start in rows that hold several, and rows whose examples cannot be told apart."""

import pytest
import torch
from torch import Tensor

from fish_tuning.scoring.inputs.segments import find_segments

PAD = 0


def batch(ids, **entries):
    values = {"input_ids": ids, **entries}
    return {
        key: value if isinstance(value, Tensor) else torch.tensor(value)
        for key, value in values.items()
    }


TWO = [(0, 0, 3), (0, 3, 5)]
ROW = [[5, 6, 7, 8, 9]]


@pytest.mark.parametrize(
    ("entries", "segments"),
    [
        ({"position_ids": [[0, 1, 2, 0, 1]]}, TWO),
        ({"position_ids": [[2, 3, 4, 2, 3]]}, TWO),
        ({"position_ids": [[7, 8, 9, 0, 1]]}, TWO),
        ({"position_ids": [[0, 0, 1, 2, 0]]}, [(0, 0, 1), (0, 1, 4), (0, 4, 5)]),
        ({"seq_idx": [[0, 0, 0, 1, 1]]}, TWO),
        ({"cu_seq_lens_q": [0, 3, 5], "cu_seq_lens_k": [0, 3, 5]}, TWO),
        ({"cu_seq_lens_q": [0, 3, 3, 5]}, TWO),
        ({"attention_mask": [[1, 1, 1, 2, 2]]}, TWO),
        ({"position_ids": [[0, 1, 2, 0, 1]], "seq_idx": [[4, 4, 4, 9, 9]]}, TWO),
        ({"position_ids": [[0, 1, 2, 0, 1]], "attention_mask": [[1, 1, 1, 1, 1]]}, TWO),
        ({"position_ids": [[0, 1, 2, 0, 1]], "cu_seq_lens_q": [0, 3, 5]}, TWO),
        # One example, whose borders are told all the same.
        ({"position_ids": [[0, 1, 2, 3, 4]], "cu_seq_lens_q": [0, 5]}, [(0, 0, 5)]),
    ],
)
def test_examples_of_one_row(entries, segments):
    """Guards every way to say where an example starts."""
    assert find_segments(batch(ROW, **entries), PAD) == segments


@pytest.mark.parametrize("ids", ["inputs_embeds", "tokens", "labels"])
def test_other_names_of_the_text(ids):
    """Guards models of the caller's own, whose input has another name."""
    text = torch.ones(1, 5, 3) if ids == "inputs_embeds" else torch.ones(1, 5).long()
    named = {ids: text, "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
    assert find_segments(named, PAD) == TWO


def test_examples_of_several_rows():
    """Guards batches of packed rows, some with padding and some without."""
    found = find_segments(
        batch(
            [[5, 6, 7, 8, 9, 4], [3, 4, 5, 6, PAD, PAD]],
            position_ids=[[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]],
            labels=[[-100, 6, 7, -100, 9, -100], [-100, 4, 5, 6, -100, -100]],
        ),
        PAD,
    )
    assert found == [(0, 0, 3), (0, 3, 5), (0, 5, 6), (1, 0, 4)]
    lengths = batch([[5, 6, 7], [8, 9, 4]], cu_seq_lens_q=[0, 2, 3, 5, 6])
    assert find_segments(lengths, PAD) == [(0, 0, 2), (0, 2, 3), (1, 0, 2), (1, 2, 3)]


@pytest.mark.parametrize(
    "padding",
    [
        {"position_ids": [[0, 1, 0, 1, 2, 0, 0, 0]]},
        {"position_ids": [[0, 1, 0, 1, 2, 3, 4, 5]], "attention_mask": [[1, 1, 1, 1, 1, 0, 0, 0]]},
        {"seq_idx": [[0, 0, 1, 1, 1, -1, -1, -1]]},
        {"cu_seq_lens_q": [0, 2, 5]},
        {"cu_seq_lens_q": [0, 2, 5, 6, 7, 8], "position_ids": [[0, 1, 0, 1, 2, 0, 0, 0]]},
        {"attention_mask": [[1, 1, 2, 2, 2, 0, 0, 0]]},
    ],
)
@pytest.mark.parametrize("pad_id", [PAD, 3, None])
def test_padding_at_the_end_of_a_row_is_no_example(padding, pad_id):
    """Guards the count of examples, whether or not the padding's token is known."""
    ids, labels = [[5, 6, 7, 8, 9, PAD, PAD, PAD]], [[-100, 6, -100, 8, 9, -100, -100, -100]]
    assert find_segments(batch(ids, labels=labels, **padding), pad_id) == [(0, 0, 2), (0, 2, 5)]


def test_a_token_at_the_end_of_a_row_may_be_an_example():
    """Guards the count of examples against dropping one that is short."""
    row = batch([[5, 6, 7]], position_ids=[[0, 1, 0]], labels=[[-100, 6, -100]])
    assert find_segments(row, PAD) == [(0, 0, 2), (0, 2, 3)]
    assert find_segments(row, 7) == [(0, 0, 2)]
    assert find_segments(row) == [(0, 0, 2)]


@pytest.mark.parametrize(
    "ordinary",
    [
        {},
        {"attention_mask": [[1, 1, 1, 1, 1]]},
        {"attention_mask": [[2, 1, 1, 1, 1]]},
        {"position_ids": [[0, 1, 2, 3, 4]]},
        {"position_ids": [[0, 1, 2, 5, 6]]},
        {"position_ids": [[0, 1, 2, 0, 0]], "attention_mask": [[1, 1, 1, 0, 0]]},
        {"position_ids": [[1, 1, 0, 1, 2]], "attention_mask": [[0, 0, 1, 1, 1]]},
        {"position_ids": [[0, 0, 0, 1, 2]], "attention_mask": [[0, 0, 1, 1, 1]]},
        # A pair of sentences with one label for both.
        {"position_ids": [[0, 1, 2, 0, 1]], "labels": [1]},
        {"position_ids": [[0, 1, 2, 0, 1]], "labels": [[0.0, 1.0, 1.0]]},
        {"seq_idx": [[0, 0, 0, 0, 0]], "labels": [1]},
        {"position_ids": [[[0, 1, 1, 1, 2]], [[0, 1, 1, 2, 2]], [[0, 1, 2, 1, 2]]]},
    ],
)
def test_rows_of_one_example(ordinary):
    """Guards ordinary batches: they are scored as they are."""
    assert find_segments(batch(ROW, **ordinary)) is None


def test_batches_without_text():
    """Guards batches that are no rows of tokens."""
    assert find_segments([torch.zeros(2, 3), torch.zeros(2)]) is None
    assert find_segments({"pixel_values": torch.zeros(2, 3, 8, 8)}) is None


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"position_ids": [[0, 1, 2, 1, 2]]}, r"row 0 go down to 1 at token 3, where no example"),
        ({"position_ids": [[4, 3, 2, 1, 0]]}, "row 0 go down to 3 at token 1"),
        ({"position_ids": [[0, 1, 5, 0, 1]]}, "leave some out, so it is not clear"),
        ({"position_ids": [[0, 0, 0, 0, 0]]}, "never count up, so it is not clear"),
        ({"position_ids": [[0, 1, 2, 0, 1]], "seq_idx": [[0, 0, 1, 1, 1]]}, "seq_idx and position"),
        ({"position_ids": [[0, 1, 2, 3, 4]], "seq_idx": [[0, 0, 1, 1, 1]]}, "disagree about where"),
        (
            {"position_ids": [[0, 1, 2, 0, 1]], "cu_seq_lens_q": [0, 5]},
            "cu_seq_lens_q and position",
        ),
        ({"cu_seq_lens_q": [0, 3, 6]}, r"cu_seq_lens_q=\[0, 3, 6\] does not divide"),
        ({"cu_seq_lens_q": [1, 3, 5]}, "does not divide a batch of 1 rows of 5 tokens"),
        ({"cu_seq_lens_q": [0, 4, 3, 5]}, "does not divide"),
        ({"cu_seq_lens_q": [0, 3, 5], "cu_seq_lens_k": [0, 2, 5]}, "does not divide"),
        ({"position_ids": [[0, 1, 2, 0, 1]], "labels": [1, 0]}, r"hold 2 examples, and labels of"),
        ({"seq_idx": [[0, 0, 0, 1, 1]], "labels": [1]}, r"labels of shape \(1,\) cannot be"),
        ({"position_ids": [[[0, 1, 2, 0, 1]]] * 3}, r"shape \(3, 1, 5\) \(M-RoPE\) in rows"),
        (
            {"position_ids": [[[0, 1, 2, 3, 4]]] * 3, "seq_idx": [[0, 0, 0, 1, 1]]},
            "M-RoPE.*cannot be divided: give one example a row",
        ),
    ],
)
def test_rows_that_cannot_be_divided(entries, message):
    """Guards against guessing where an example starts."""
    with pytest.raises(ValueError, match=message):
        find_segments(batch(ROW, **entries))


def test_cumulative_lengths_across_rows():
    """Guards against an example that ends in another row than it starts in."""
    with pytest.raises(ValueError, match=r"does not divide a batch of 2 rows of 3 tokens"):
        find_segments(batch([[5, 6, 7], [8, 9, 4]], cu_seq_lens_q=[0, 2, 4, 6]))
