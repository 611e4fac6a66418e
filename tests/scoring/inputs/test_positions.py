"""Padding on the left: an example is scored without it, or exactly as its row is given."""

import pytest
from peft import PromptTuningConfig, get_peft_model
from torch import nn

from fish_tuning import calculate_fisher_information
from tests.models import (
    assert_scores_close,
    examples_for,
    naive_scores,
    pad,
    tiny_gpt2,
    tiny_llama,
    with_lora,
)

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def scored(model, loader):
    return calculate_fisher_information(model, loader, progress=False)


def adapted(name):
    return with_lora(MODELS[name](), init_lora_weights=False).double()


def padded_rows(batch):
    """The examples of a batch as they are in it, with their padding."""
    return [{k: v[i : i + 1] for k, v in batch.items()} for i in range(len(batch["input_ids"]))]


def own_loss(model, row):
    return model(**row).loss


def texts_of(model, n=6):
    examples = examples_for(model, n)
    for example in examples:
        example["labels"] = example["input_ids"]
    return examples


class HandsOn(nn.Module):
    """Hands all its arguments on."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, **arguments):
        return self.inner(input_ids=input_ids, **arguments)


class WithoutPositions(HandsOn):
    def forward(self, input_ids, attention_mask=None, labels=None):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


class WithPenalty(HandsOn):
    """Has a loss that is no known likelihood."""

    def forward(self, input_ids, **arguments):
        outputs = self.inner(input_ids=input_ids, **arguments)
        if outputs.loss is not None:
            outputs.loss = outputs.loss + 0.1 * outputs.logits.square().mean()
        return outputs


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("wrapper", [HandsOn, WithoutPositions])
def test_padding_on_the_left_in_a_wrapper(name, wrapper):
    """Guards a mixture: positions that count padding, but no label for the first token."""
    model = wrapper(adapted(name))
    examples = texts_of(model.inner)
    batch = pad(examples, side="left")
    as_given = wrapper is WithoutPositions and name == "gpt2"
    rows = padded_rows(batch) if as_given else [pad([example]) for example in examples]
    expected = naive_scores(model, rows, loss=own_loss)
    assert_scores_close(scored(model, [batch]), expected, rtol=1e-6)


def test_padding_on_the_left_with_another_loss():
    """Guards positions that skip padding while padding still predicts the first token."""
    model = WithPenalty(adapted("gpt2"))
    rows = padded_rows(pad(texts_of(model.inner), side="left"))
    expected = naive_scores(model, rows, loss=own_loss)
    assert_scores_close(scored(model, rows), expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_an_empty_text_first(name):
    """Guards a decision about padding on the left by an example that is nothing else."""
    model = adapted(name)
    examples = texts_of(model)
    batch = pad(examples, side="left")
    batch["attention_mask"][0], batch["labels"][0] = 0, -100
    expected = naive_scores(model, examples[1:])
    expected = {key: value * 5 / 6 for key, value in expected.items()}
    assert_scores_close(scored(model, [batch]), expected)
    assert_scores_close(scored(model, padded_rows(batch)), expected)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_padding_between_a_prompt_and_the_text(build):
    """Guards prompt tuning: the first token of a text is predicted, by a virtual token."""
    model = get_peft_model(
        build(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).double()
    batch = pad(texts_of(model), side="left")
    expected = naive_scores(model, padded_rows(batch), loss=own_loss)
    assert_scores_close(scored(model, [batch]), expected, rtol=1e-6)
