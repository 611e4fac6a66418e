"""Rows that hold several examples are scored by example, or refused."""

import logging

import pytest
import torch
import torch.nn.functional as F
import transformers as tr
from peft import IA3Config, PromptTuningConfig, get_peft_model
from torch import nn

from fish_tuning import calculate_fisher_information
from fish_tuning.scoring.fisher import ZeroScoresError
from fish_tuning.scoring.inputs.forward import Forward
from fish_tuning.scoring.inputs.unpacking import Unpacker
from tests.models import (
    PAD,
    VOCABULARY,
    assert_scores_close,
    batches_of,
    examples_for,
    naive_scores,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    with_lora,
)


def tiny_qwen2(**config):
    """Qwen2: a Llama with biases in attention and a tied head."""
    sizes = {"hidden_size": 12, "intermediate_size": 20, "max_position_embeddings": 24}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "initializer_range": 0.2}
        return tr.Qwen2ForCausalLM(
            tr.Qwen2Config(**settings, **sizes, **layers, tie_word_embeddings=True, **config)
        )


def lora(model):
    return with_lora(model, init_lora_weights=False)


def ia3(model):
    gpt2 = isinstance(model, tr.GPT2LMHeadModel)
    attention, mlp = (["c_attn"], ["c_fc"]) if gpt2 else (["k_proj", "v_proj"], ["down_proj"])
    config = IA3Config(
        target_modules=attention + mlp,
        feedforward_modules=mlp,
        fan_in_fan_out=gpt2,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def weights(model):
    return model


MODELS = [tiny_llama, tiny_gpt2, tiny_qwen2]


def scored(model, loader, **options):
    return calculate_fisher_information(model, loader, progress=False, **options)


def lists(examples):
    """Examples as data sets hold them."""
    return [{key: example[key].tolist() for key in ("input_ids", "labels")} for example in examples]


def flattened(examples, size, **options):
    """Rows of `size` examples each."""
    collator = tr.DataCollatorWithFlattening(**options)
    rows = lists(examples)
    return [collator(rows[i : i + size]) for i in range(0, len(rows), size)]


def packed_by_trl(examples, length, strategy, **options):
    """The rows of TRL's packed data set, and the collator that its SFTTrainer takes."""
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    data = pytest.importorskip("datasets").Dataset.from_list(lists(examples))
    packed = sft.pack_dataset(data, length, strategy)
    collator = sft.DataCollatorForLanguageModeling(pad_token_id=PAD, **options)
    return [packed[i] for i in range(len(packed))], collator


def assert_close(actual, expected, rtol=1e-9):
    assert_scores_close(actual, {name: expected[name] for name in actual}, rtol)


# --- the scores of single examples ---------------------------------------------------------------


@pytest.mark.parametrize("train", [lora, weights, ia3])
@pytest.mark.parametrize("build", MODELS)
def test_flattened_rows(build, train):
    """Guards against scoring a row of several examples as if it were one."""
    model = train(build()).double()
    examples = examples_for(model, 16)
    expected = naive_scores(model, examples)
    for size in (1, 2, 4, 8, 16):
        assert_close(scored(model, flattened(examples, size)), expected)


@pytest.mark.parametrize("build", MODELS)
def test_flattened_rows_in_single_precision(build):
    """Guards float32, against padded batches of the same examples too."""
    model = lora(build())
    examples = examples_for(model, 16)
    expected = naive_scores(model, examples)
    assert_close(scored(model, batches_of(examples, 4)), expected, 1e-4)
    for size in (4, 16):
        assert_close(scored(model, flattened(examples, size)), expected, 1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"return_flash_attn_kwargs": True},
        {"return_seq_idx": True},
        {"return_flash_attn_kwargs": True, "return_seq_idx": True},
        {"separator_id": 7},
    ],
)
def test_other_forms_of_flattened_rows(options):
    """Guards every form of DataCollatorWithFlattening. A label at an example's first token means
    that the row's loss has the last token of the example before predict it: no example alone does.
    """
    model = lora(tiny_llama()).double()
    examples = examples_for(model, 8)
    rows = flattened(examples, 4, **options)
    assert_close(scored(model, rows), naive_scores(model, examples))


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("multiple", [None, 16])
def test_rows_packed_by_trl(build, multiple):
    """Guards TRL's packing (best fit decreasing) and its padding at the end of a row."""
    model = lora(build()).double()
    examples = examples_for(model, 12)
    rows, collator = packed_by_trl(
        examples, 20, "bfd", padding_free=True, pad_to_multiple_of=multiple
    )
    loader = [collator(rows[i : i + 3]) for i in range(0, len(rows), 3)]
    assert sum(batch["input_ids"].shape[1] for batch in loader) < 12 * 11
    assert_close(scored(model, loader), naive_scores(model, examples))


def test_rows_wrapped_by_trl():
    """Guards wrapped packing: nothing tells where its texts start, so a piece is an example."""
    model = lora(tiny_llama()).double()
    examples = examples_for(model, 12)
    for padding_free in (False, True):
        pieces, collator = packed_by_trl(examples, 10, "wrapped", padding_free=padding_free)
        expected = naive_scores(
            model, [{key: torch.tensor(value) for key, value in piece.items()} for piece in pieces]
        )
        loader = [collator(pieces[i : i + 3]) for i in range(0, len(pieces), 3)]
        assert_close(scored(model, loader), expected)


def test_several_rows_of_several_examples():
    """Guards batches of packed rows with padding at their ends."""
    model = lora(tiny_llama()).double()
    examples = examples_for(model, 8)
    rows = flattened(examples, 3)
    keys = rows[0].keys()
    joined = {
        key: nn.utils.rnn.pad_sequence(
            [row[key][0] for row in rows],
            batch_first=True,
            padding_value=-100 if key == "labels" else 0,
        )
        for key in keys
    }
    assert_close(scored(model, [joined]), naive_scores(model, examples))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_implementations_of_attention(attention):
    """Guards both kinds of masks that transformers makes from position ids."""
    model = lora(tiny_llama(attn_implementation=attention)).double()
    examples = examples_for(model, 6)
    assert_close(scored(model, flattened(examples, 3)), naive_scores(model, examples))


def test_masks_that_separate_the_examples():
    """Guards 4-D masks: what they allow is shown by running the model, for every batch."""
    model = lora(tiny_llama()).double()
    examples = examples_for(model, 6)
    rows = flattened(examples, 3)
    for row in rows:
        number = (row["position_ids"] == 0).cumsum(1)
        width = number.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        allowed = (number.unsqueeze(1) == number.unsqueeze(2)) & causal
        row["attention_mask"] = allowed.unsqueeze(1)
    assert_close(scored(model, rows), naive_scores(model, examples))
    rows[1]["attention_mask"][:] = causal
    with pytest.raises(ValueError, match="outputs of LlamaForCausalLM for an example change"):
        scored(model, rows)


@pytest.mark.parametrize("build", MODELS)
def test_true_fisher_information(build):
    """Guards the random stream of every example: the labels are those of padded batches."""
    model = lora(build()).double()
    examples = examples_for(model, 8)
    options = {"estimator": "true", "label_samples": 2, "seed": 3}
    expected = scored(model, batches_of(examples, 1), **options)
    for size in (1, 3, 8):
        assert_close(scored(model, flattened(examples, size), **options), expected)


@pytest.mark.parametrize("most", [1, 3, 5])
def test_num_samples_counts_examples(most):
    """Guards the count of examples, also where it ends within a row."""
    model = lora(tiny_llama()).double()
    examples = examples_for(model, 8)
    scores = scored(model, flattened(examples, 4), num_samples=most)
    assert_close(scores, naive_scores(model, examples[:most]))


def test_a_loss_of_the_models_own():
    """Guards models that are scored one example at a time: by their loss of the example alone."""
    model = lora(tiny_llama()).double()

    def loss_function(logits, labels, **_):
        tokens, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return F.cross_entropy(tokens, targets, label_smoothing=0.3)

    def loss(model, example):
        return loss_function(model(example["input_ids"][None]).logits, example["labels"][None])

    model.get_base_model().loss_function = loss_function
    examples = examples_for(model, 6)
    scores = scored(model, flattened(examples, 3))
    assert_close(scores, naive_scores(model, examples, loss=loss))


def test_a_loss_fn_gets_one_example_a_row():
    """Guards what a `loss_fn` is given: a loss for each example, and entries of its own padded."""
    model = lora(tiny_llama()).double()
    examples = examples_for(model, 6)
    rows = flattened(examples, 3)
    for row in rows:
        row["targets"] = row.pop("labels")
        row["weights"] = torch.arange(row["targets"].shape[1]).double().unsqueeze(0)

    def loss_fn(outputs, batch):
        assert batch["weights"].shape == batch["attention_mask"].shape == batch["targets"].shape
        losses = F.cross_entropy(
            outputs.logits[:, :-1].transpose(1, 2), batch["targets"][:, 1:], reduction="none"
        )
        return losses.sum(1) / (batch["targets"][:, 1:] != -100).sum(1)

    scores = scored(model, rows, loss_fn=loss_fn)
    assert_close(scores, naive_scores(model, examples))


def test_one_pass_for_each_row():
    """Guards against the price of one pass per example."""
    model = lora(tiny_llama())
    rows = flattened(examples_for(model, 16, shortest=5, longest=5), 8)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    scored(model, rows)
    # One example to recognize the loss by, two forward passes to see that examples are
    # independent, and one pass per row.
    assert len(calls) == 5


def test_long_examples_do_not_pad_short_ones():
    """Guards time and memory: no part has more tokens than its row."""
    model = lora(tiny_llama(max_position_embeddings=200)).double()
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, VOCABULARY, (n,), generator=generator) for n in (3, 90, 4, 3, 5)]
    examples = [{"input_ids": x, "labels": x} for x in ids]
    shapes = []
    model.register_forward_pre_hook(
        lambda _, __, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    expected = naive_scores(model, examples)
    shapes.clear()
    assert_close(scored(model, flattened(examples, 5)), expected)
    assert max(shape.numel() for shape in shapes[3:]) <= 105


# --- examples that are not independent -----------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("build", MODELS)
def test_an_attention_mask_joins_the_examples(build, attention):
    """Guards rows with an attention mask: transformers then ignores the position ids' starts."""
    model = lora(build(attn_implementation=attention))
    (row,) = flattened(examples_for(model, 4, longest=5), 4)
    row["attention_mask"] = torch.ones_like(row["input_ids"])
    with pytest.raises(ValueError, match=r"change with the other examples of its row.*give posit"):
        scored(model, [row])


def test_rows_of_one_example_show_nothing():
    """Guards against taking a first batch without several examples for a proof."""
    model = lora(tiny_llama())
    examples = examples_for(model, 5)
    rows = [*flattened(examples[:1], 1), *flattened(examples[1:], 4)]
    for row in rows:
        row["seq_idx"] = (row["position_ids"] == 0).cumsum(1)
        row["attention_mask"] = torch.ones_like(row["input_ids"])
    with pytest.raises(ValueError, match="change with the other examples of its row"):
        scored(model, rows)


@pytest.mark.parametrize("options", [{"return_seq_idx": True}, {"return_flash_attn_kwargs": True}])
def test_borders_that_the_model_does_not_read(options):
    """Guards borders that only other kinds of models or attention respect."""
    model = lora(tiny_llama())
    rows = flattened(examples_for(model, 4), 4, return_position_ids=False, **options)
    with pytest.raises(ValueError, match="change with the other examples of its row"):
        scored(model, rows)


def test_encoders_are_refused():
    """Guards models whose attention looks in both directions, without a mask between examples."""
    model = lora(tiny_bert(task="MaskedLM"))
    rows = flattened(examples_for(model, 4, longest=5), 4)
    with pytest.raises(ValueError, match="outputs of BertForMaskedLM for an example change"):
        scored(model, rows)


def test_prompts_are_refused():
    """Guards prompt tuning, where PEFT drops position ids and each row has one prompt."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(tiny_llama(), config)
    with (
        pytest.warns(UserWarning, match="Position ids are not supported"),
        pytest.raises(ValueError, match="change with the other examples of its row"),
    ):
        scored(model, flattened(examples_for(model, 4), 4))


def test_encoder_decoders_are_refused():
    """Guards labels that are no tokens of the row."""
    model = lora(tiny_t5())
    rows = flattened(examples_for(tiny_llama(), 4), 4)
    rows[0]["labels"] = rows[0]["labels"][:, 2:]
    with pytest.raises(ValueError, match="hold 4 examples, and labels of shape"):
        scored(model, rows)


def test_entries_that_cannot_be_divided():
    """Guards entries that belong to one of the examples, nobody knows which."""
    model = lora(tiny_llama())
    rows = flattened(examples_for(model, 4), 4)
    rows[0]["past_key_values"] = torch.zeros(3)
    with pytest.raises(ValueError, match="'past_key_values' has no entry for each token"):
        scored(model, rows)


class NextToken(nn.Module):
    """Every token sees itself and the one before it, whichever example that is of."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids, position_ids):
        hidden = self.embedding(input_ids)
        return self.head(hidden + F.pad(hidden[:, :-1], (0, 0, 1, 0)))


def test_a_single_token_that_sees_another_example():
    """Guards against an average over tokens: a short convolution joins examples at their ends."""
    rows = flattened(examples_for(tiny_llama(), 4, shortest=9), 4)
    with pytest.raises(ValueError, match="outputs of NextToken for an example change"):
        scored(NextToken(), rows, loss_fn=lambda outputs, batch: outputs.sum((1, 2)))


@pytest.mark.parametrize("build", MODELS)
def test_half_precision_and_outputs_of_zero(build):
    """Guards against refusing rows for rounding errors, or for a head that starts at 0."""
    model = lora(build()).bfloat16()
    rows = flattened(examples_for(model, 8), 4)
    scored(model, rows)
    model.get_base_model().get_output_embeddings().weight.data.zero_()
    with pytest.raises(ZeroScoresError):  # Through such a head no gradient reaches the adapter.
        scored(model, rows)


def test_outputs_without_tokens():
    """Guards models whose outputs cannot show that examples are independent."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, 3)

        def forward(self, input_ids, position_ids):
            return self.embedding(input_ids).mean(1)

    rows = flattened(examples_for(tiny_llama(), 4), 4)
    with pytest.raises(ValueError, match="Pooled has no output for each token that could show"):
        scored(Pooled(), rows, loss_fn=lambda outputs, batch: outputs.sum(1))


def test_ordinary_batches_stay_as_they_are():
    """Guards the scores of every other batch."""
    unpack = Unpacker(Forward(tiny_llama()))
    (batch,) = batches_of(examples_for(tiny_llama(), 3), 3)
    assert unpack(batch) == (batch, None)
    pair = [torch.zeros(2, 3), torch.zeros(2)]
    assert unpack(pair) == (pair, None)


def test_nothing_is_logged(caplog):
    """Guards against a warning about entries that nobody gave."""
    with caplog.at_level(logging.WARNING):
        scored(lora(tiny_llama()), flattened(examples_for(tiny_llama(), 4), 4))
    assert not caplog.records
