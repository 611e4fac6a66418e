"""Labels of padding, and those of the first token of a text."""

import pytest
import torch

from fish_tuning import calculate_fisher_information
from fish_tuning.scoring.inputs.labels import predicted_from_text
from tests.models import (
    IGNORED,
    PAD,
    assert_scores_close,
    naive_scores,
    tiny_gpt2,
    tiny_llama,
    with_lora,
)

LENGTHS, WIDTH = (3, 9, 5, 7, 4), 9


def padded(side):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (len(LENGTHS), WIDTH), generator=generator)
    lengths = torch.tensor(LENGTHS)[:, None]
    mask = (torch.arange(WIDTH) < lengths).long()
    mask = mask if side == "right" else mask.flip(1)
    return {"input_ids": ids.where(mask == 1, PAD), "attention_mask": mask}


@pytest.mark.parametrize("size", [1, 2, len(LENGTHS)])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("side", ["right", "left"])
def test_labels_of_padding_count_if_given(side, build, size):
    """Guards `labels = input_ids.copy()`, as tutorials have it: the model's loss has padding."""
    model = with_lora(build(), init_lora_weights=False).double()
    batch = padded(side)
    batch["labels"] = batch["input_ids"].clone()
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(LENGTHS))]
    loader = [{k: v[i : i + size] for k, v in batch.items()} for i in range(0, len(LENGTHS), size)]
    scores = calculate_fisher_information(model, loader, progress=False)
    # The logits are float32 in the models' own loss.
    expected = naive_scores(model, rows, loss=lambda model, row: model(**row).loss)
    assert_scores_close(scores, expected, rtol=2e-5)


@pytest.mark.parametrize("labeled", [False, True])
def test_the_first_token_after_padding(labeled):
    """Guards against a label that only padding predicts, in rows whose padding has no labels."""
    for side in ("right", "left"):
        batch = padded(side)
        mask = batch["attention_mask"]
        labels = batch["input_ids"].masked_fill(mask == 0, IGNORED)
        expected = labels.clone()
        if labeled:
            labels[0] = expected[0] = PAD
        if side == "left":
            for row, length in enumerate(LENGTHS):
                if length < WIDTH and not (labeled and row == 0):
                    expected[row, WIDTH - length] = IGNORED
        assert torch.equal(predicted_from_text(labels, batch | {"labels": labels}), expected)
