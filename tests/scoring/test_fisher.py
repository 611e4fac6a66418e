"""Scores of whole models against a loop over examples, and everything a call borrows."""

import copy
import functools
import random
import re

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertForSequenceClassification

from fish_tuning import calculate_fisher_information, score_with_perturbed_b
from tests.models import (
    OLD_TRANSFORMERS,
    assert_scores_close,
    batches_of,
    examples_for,
    naive_scores,
    pad,
    tiny_bart,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_roberta,
    tiny_t5,
    with_lora,
)
from tests.rounding import float32_rtol

MODELS = {
    "bert": tiny_bert,
    "roberta": tiny_roberta,
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "t5": tiny_t5,
}
# Heads, (tied) word embeddings, LayerNorm and RMSNorm, biases.
MORE = re.compile(r"classifier|lm_head|word_emb|embed_tokens|wte|shared|[nN]orm|ln_|\.bias$")


def scored(model, loader, **options):
    return calculate_fisher_information(model, loader, progress=False, **options)


def messages(caplog, part=""):
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("fish_tuning")]
    return [message for message in ours if part in message]


SLOW = "one example at a time"


def adapted(build, more=False):
    model = with_lora(build(), init_lora_weights=False)
    for name, parameter in model.named_parameters():
        if more and MORE.search(name) and "original_module" not in name:
            parameter.requires_grad_()
    return model


# --- against the loop ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_scores_equal_the_loop_at_any_batch_size(name, dtype, caplog):
    """Guards against squares of batch means, padding that counts, a lost use of a tied weight,
    a layer type with a wrong rule, and a silent fall back to the slow path."""
    model = adapted(MODELS[name], more=True).to(dtype)
    examples = examples_for(model, 33)
    naive = functools.partial(naive_scores, model, examples)
    expected = naive()
    rtol = 1e-9 if dtype == torch.float64 else float32_rtol(model, naive, expected)
    for size in (1, 5, 32):
        scores = scored(model, batches_of(examples, size))
        assert {score.dtype for score in scores.values()} == {dtype}
        assert_scores_close(scores, expected, rtol)
    assert not messages(caplog)


@pytest.mark.parametrize("name", MODELS)
def test_adapters_alone(name, caplog):
    """Guards the shortcut of backward where only some layers are trainable, and the order of the
    examples in batches."""
    model = adapted(MODELS[name]).double()
    examples = examples_for(model, 7)
    expected = naive_scores(model, examples)
    assert_scores_close(scored(model, batches_of(examples, 3)), expected)
    assert_scores_close(scored(model, batches_of(examples[::-1], 4)), expected)
    assert not messages(caplog)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_on_the_left(name):
    """Guards against positions that count padding, and against a first token that padding
    predicts (alone, nothing predicts it)."""
    model = adapted(MODELS[name], more=True).double()
    examples = examples_for(model, 6)
    for example in examples:
        example["labels"] = example["input_ids"]
    scores = scored(model, batches_of(examples, 4, side="left"))
    assert_scores_close(scores, naive_scores(model, examples))


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (tiny_bert, {"task": "TokenClassification"}),
        (tiny_bert, {"num_labels": 1}),
        (tiny_bert, {"num_labels": 2, "problem_type": "regression"}),
        (tiny_bert, {"num_labels": 3, "problem_type": "multi_label_classification"}),
        (tiny_roberta, {"num_labels": 1, "problem_type": "multi_label_classification"}),
        (tiny_llama, {"task": "SequenceClassification", "num_labels": 3}),
        (tiny_gpt2, {"model_class": "GPT2ForSequenceClassification", "num_labels": 2}),
        (tiny_bert, {"task": "MaskedLM"}),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("power", [1, 2])
def test_tasks(build, options, power, caplog):
    """Guards the reading of every kind of labels, and the absolute statistic."""
    model = adapted(lambda: build(**options)).double()
    examples = examples_for(model, 6)
    expected = naive_scores(model, examples, power)
    statistic = {1: "absolute", 2: "squared"}[power]
    scores = scored(model, batches_of(examples, 4), statistic=statistic)
    assert_scores_close(scores, expected)
    assert not messages(caplog, SLOW)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_sum_over_tokens(name):
    """Guards token_reduction="sum": log p of the whole sequence, long ones weigh more."""
    model = adapted(MODELS[name]).double()
    examples = examples_for(model, 5)

    def loss(model, example):
        outputs = model(**pad([example]))
        labels = example["labels"]
        logits = outputs.logits[0]
        if name == "llama":
            logits, labels = logits[:-1], labels[1:]
        return F.cross_entropy(logits, labels, reduction="sum")

    scores = scored(model, batches_of(examples, 3), token_reduction="sum")
    assert_scores_close(scores, naive_scores(model, examples, 2, loss))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_all_of_a_models_own_weights(name, caplog):
    """Guards positions that a batch shares, (1, t): they have one gradient for all examples."""
    model = MODELS[name]().double()
    examples = examples_for(model, 6)
    expected = naive_scores(model, examples)
    for size in (1, 4):
        assert_scores_close(scored(model, batches_of(examples, size)), expected)
    assert not messages(caplog, SLOW)


T, QV = peft.TaskType, ["query", "value"]
METHODS = {
    "dora bert": (
        tiny_bert,
        peft.LoraConfig(task_type=T.SEQ_CLS, use_dora=True, target_modules=QV),
    ),
    "vera bert": (tiny_bert, peft.VeraConfig(task_type=T.SEQ_CLS, r=3, target_modules=QV)),
    "ia3 llama": (tiny_llama, peft.IA3Config(task_type=T.CAUSAL_LM)),
    "ia3 t5": (tiny_t5, peft.IA3Config(task_type=T.SEQ_2_SEQ_LM)),
    "loha bert": (tiny_bert, peft.LoHaConfig(task_type=T.SEQ_CLS, target_modules=QV)),
    "layer norm bert": (
        tiny_bert,
        peft.LNTuningConfig(task_type=T.SEQ_CLS, target_modules=["LayerNorm"]),
    ),
    "tokens bert": (
        tiny_bert,
        peft.TrainableTokensConfig(
            T.SEQ_CLS, token_indices=[3, 4], target_modules=["word_embeddings"]
        ),
    ),
    "lora embedding": (
        tiny_llama,
        peft.LoraConfig(task_type=T.CAUSAL_LM, target_modules=["embed_tokens", "q_proj"]),
    ),
    "lora bias": (
        tiny_bert,
        peft.LoraConfig(task_type=T.SEQ_CLS, target_modules=QV, lora_bias=True, bias="all"),
    ),
    "prompt bert": (tiny_bert, peft.PromptTuningConfig(task_type=T.SEQ_CLS, num_virtual_tokens=3)),
    "prompt gpt2": (
        tiny_gpt2,
        peft.PromptTuningConfig(task_type=T.CAUSAL_LM, num_virtual_tokens=3),
    ),
    "prompt t5": (tiny_t5, peft.PromptTuningConfig(task_type=T.SEQ_2_SEQ_LM, num_virtual_tokens=3)),
    "p-tuning llama": (
        tiny_llama,
        peft.PromptEncoderConfig(
            task_type=T.CAUSAL_LM, num_virtual_tokens=3, encoder_hidden_size=8
        ),
    ),
    "prefix bert": (tiny_bert, peft.PrefixTuningConfig(task_type=T.SEQ_CLS, num_virtual_tokens=3)),
    "prefix gpt2": (
        tiny_gpt2,
        peft.PrefixTuningConfig(task_type=T.CAUSAL_LM, num_virtual_tokens=3),
    ),
    "prefix t5": (tiny_t5, peft.PrefixTuningConfig(task_type=T.SEQ_2_SEQ_LM, num_virtual_tokens=3)),
}


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("method", METHODS)
def test_other_adapters(method, caplog):
    """Guards against wrong scores, or slow ones, of adapters that are not made of linear layers."""
    build, config = METHODS[method]
    model = peft.get_peft_model(build(), copy.deepcopy(config)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    examples = examples_for(model, 6)
    scores = scored(model, batches_of(examples, 3))
    assert_scores_close(scores, naive_scores(model, examples))
    assert not messages(caplog, SLOW)


def test_one_warning_for_many_batches(caplog):
    """Guards against a warning for every batch, or none: the time it takes must be explained."""
    config = peft.AdaptionPromptConfig(T.CAUSAL_LM, adapter_len=4, adapter_layers=2)
    model = peft.get_peft_model(tiny_llama(), config)
    scored(model, batches_of(examples_for(model, 6), 2))
    (message,) = messages(caplog, SLOW)
    assert message.startswith("Scoring one example at a time, which is slower: ")
    assert "adaption_prompt is part of a AdaptedAttention, which does not take and" in message


# --- options -------------------------------------------------------------------------------


@pytest.fixture
def model():
    return adapted(tiny_bert).double()


@pytest.mark.parametrize("num_samples", [1, 4, 6])
def test_num_samples_cuts_inside_a_batch(model, num_samples):
    """Guards against whole batches only, a mean over the wrong number, and reading on."""
    examples = examples_for(model, 9)
    read = []

    def loader():
        for batch in batches_of(examples, 4):
            read.append(batch)
            yield batch

    scores = scored(model, loader(), num_samples=num_samples)
    assert_scores_close(scores, naive_scores(model, examples[:num_samples]))
    assert len(read) == -(-num_samples // 4)


def test_fewer_examples_than_asked_for(model, caplog):
    """Guards against dividing by what was asked for, in silence."""
    examples = examples_for(model, 3)
    scores = scored(model, batches_of(examples, 2), num_samples=5)
    assert_scores_close(scores, naive_scores(model, examples))
    assert messages(caplog) == ["num_samples=5, but there were only 3 examples"]


def test_loss_fn_of_outputs_and_batch(model, caplog):
    """Guards the call for other models: outputs without their own loss, the whole batch."""
    examples = examples_for(model, 6)
    for i, example in enumerate(examples):
        example["weight"] = torch.tensor(float(i))

    def loss_fn(outputs, batch):
        assert outputs.loss is None
        losses = F.cross_entropy(outputs.logits, batch["labels"], reduction="none")
        return batch["weight"] * losses

    def loss(model, example):
        return loss_fn(model(input_ids=example["input_ids"][None]), pad([example])).sum()

    scores = scored(model, batches_of(examples, 4), loss_fn=loss_fn)
    assert_scores_close(scores, naive_scores(model, examples, 2, loss))
    assert messages(caplog) == [
        "Dropped from the calibration batches, as BertForSequenceClassification.forward does not "
        "take them: weight"
    ]


@pytest.mark.parametrize("kind", [list, tuple])
def test_batches_as_sequences(kind):
    """Guards (input, labels) batches, as a DataLoader over a TensorDataset gives."""
    torch.manual_seed(0)
    x, y = torch.randn(7, 4), torch.randint(0, 3, (7,))
    net = nn.Linear(4, 3)
    batches = [kind([x[i : i + 3], y[i : i + 3]]) for i in range(0, 7, 3)]
    g = net(x).softmax(-1).detach() - F.one_hot(y, 3)
    expected = {
        "weight": (g[:, :, None] * x[:, None]).square().mean(0),
        "bias": g.square().mean(0),
    }
    assert_scores_close(scored(net, batches), expected, 1e-5)
    own = scored(net, batches, loss_fn=lambda o, b: F.cross_entropy(o, b[1], reduction="none"))
    assert_scores_close(own, expected, 1e-5)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_device_as_string_or_object(model, device):
    """Guards the first implementation's third argument, by position too."""
    batches = batches_of(examples_for(model, 3), 2)
    by_position = calculate_fisher_information(model, batches, device, progress=False)
    by_name = calculate_fisher_information(
        model=model, calibration_dataloader=batches, device=device, progress=False
    )
    assert_scores_close(by_position, by_name, 0)


def test_model_moves_to_the_device(model, monkeypatch):
    """Guards against scoring where the model was."""
    moved = []
    monkeypatch.setattr(type(model), "to", lambda self, device: moved.append(device))
    batches = batches_of(examples_for(model, 2), 2)
    scored(model, batches)
    assert not moved
    scored(model, batches, device="cpu")
    score_with_perturbed_b(model, batches, "cpu", progress=False)
    assert set(moved) == {"cpu"}


def test_progress_can_be_turned_off(model, capsys):
    """Guards against output in logs of jobs, and a bar that never shows."""
    batches = batches_of(examples_for(model, 3), 2)
    scored(model, batches)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    calculate_fisher_information(model, batches)
    assert "Fisher" in capsys.readouterr().err


def test_dropout_is_off(model):
    """Guards against noise in the scores: the models above drop 10% in training mode."""
    batches = batches_of(examples_for(model, 6), 3)
    model.eval()
    expected = scored(model, batches)
    assert_scores_close(scored(model.train(), batches), expected, 0)


def test_dropped_keys_are_named_once(model, caplog):
    """Guards against a TypeError for columns that the model does not take, and silence."""
    examples = examples_for(model, 4)
    expected = scored(model, batches_of(examples, 2))
    for i, example in enumerate(examples):
        example.update(idx=torch.tensor(i), sentence_id=torch.tensor(i))
    assert_scores_close(scored(model, batches_of(examples, 2)), expected, 0)
    (message,) = messages(caplog)
    assert message.endswith("does not take them: idx, sentence_id")


# --- precision -----------------------------------------------------------------------------


def assert_near(scores, expected, tolerance):
    assert scores.keys() == expected.keys()
    for name, score in scores.items():
        assert score.dtype == torch.float32
        assert (score - expected[name]).norm() <= tolerance * expected[name].norm(), name


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_model(name, size, caplog):
    """Guards float32 scores of bfloat16 parameters; the model's own rounding stays."""
    if OLD_TRANSFORMERS and name == "t5":
        pytest.skip("T5 rounds more before transformers 5")
    model = adapted(MODELS[name]).bfloat16()
    examples = examples_for(model, 8)
    scores = scored(model, batches_of(examples, size))
    assert_near(scores, naive_scores(model.float(), examples), 0.25)
    assert not messages(caplog)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_autocast(name, caplog):
    """Guards against a check of the first batch that bfloat16 rounding fails, and against
    weights that autocast cached without a gradient."""
    model = adapted(MODELS[name], more=True)
    examples = examples_for(model, 8)
    keys = re.compile(r"key\.base_layer\.bias$")
    expected = naive_scores(model, examples)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = scored(model, batches_of(examples, 4))
    for parameters in (scores, expected):
        for key in filter(keys.search, [*parameters]):
            del parameters[key]
    assert_near(scores, expected, 0.15)
    assert not messages(caplog)


class BehindItsBack(nn.Linear):
    """Has no rule."""

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("layer", [nn.Linear, BehindItsBack])
def test_half_precision_sums_in_float32(layer):
    """Guards against a sum in bfloat16, which stops growing at 256 equal examples."""
    net = layer(2, 1).bfloat16()
    x, y = torch.ones(1, 2, dtype=torch.bfloat16), torch.full((1,), 3.0)
    loader = [(x.expand(100, -1), y.expand(100))] * 6
    one, many = scored(net, [(x, y)]), scored(net, loader)
    assert_scores_close(many, one, 1e-5)


# --- what a call borrows -------------------------------------------------------------------


def snapshot(model):
    return {
        "modes": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        "torch": torch.get_rng_state().tolist(),
        "numpy": str(np.random.get_state()),
        "random": random.getstate(),
        "grad enabled": torch.is_grad_enabled(),
    }


def consuming(batches):
    """A loader that uses every generator, as one that shuffles and augments does."""
    for batch in batches:
        torch.rand(3), np.random.rand(3), random.random()
        yield batch


def raising(batches):
    yield batches[0]
    raise RuntimeError("the disk is gone")


def not_finite(outputs, batch):
    return outputs.logits.sum(1) / (batch["labels"] < 0)


def raising_loss(outputs, batch):
    raise RuntimeError("the disk is gone")


@pytest.mark.parametrize("score", [calculate_fisher_information, score_with_perturbed_b])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("loader", "options", "error"),
    [
        (consuming, {}, None),
        (consuming, {"estimator": "true", "label_samples": 2}, None),
        (raising, {}, "the disk is gone"),
        (consuming, {"loss_fn": raising_loss}, "the disk is gone"),
        (consuming, {"loss_fn": not_finite}, "the loss of calibration example 0 is"),
    ],
    ids=["done", "sampled", "loader raises", "loss raises", "not finite"],
)
def test_everything_is_given_back(score, dora, loader, options, error):
    """Guards modes of each module, requires_grad, gradients, hooks, random states and
    parameters, also after an exception on either path."""
    model = with_lora(tiny_bert(), use_dora=dora)
    model.train()
    model.base_model.model.bert.encoder.layer[0].eval()
    kept = {}
    for i, parameter in enumerate(model.parameters()):
        if parameter.requires_grad and i % 2:
            parameter.grad = torch.full_like(parameter, 7.0)
        kept[parameter] = (parameter.grad, parameter.detach().clone())
    batches = batches_of(examples_for(model, 4), 2)
    before = snapshot(model)
    with torch.no_grad():
        if error is None:
            score(model, loader(batches), progress=False, **options)
        else:
            with pytest.raises((RuntimeError, ValueError), match=error):
                score(model, loader(batches), progress=False, **options)
    assert snapshot(model) == before
    for parameter, (gradient, value) in kept.items():
        assert parameter.grad is gradient
        assert gradient is None or bool((gradient == 7).all())
        assert torch.equal(parameter, value)
        assert torch.equal(parameter.signbit(), value.signbit())


def test_shuffling_loader_does_not_move_the_callers_stream():
    """Guards the torch generator where the loader draws its seed from it."""
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    data = TensorDataset(torch.randn(8, 4), torch.randint(0, 3, (8,)))
    state = torch.get_rng_state()
    scored(net, DataLoader(data, batch_size=3, shuffle=True))
    assert torch.equal(torch.get_rng_state(), state)


# --- a loss of the model's own -------------------------------------------------------------


class Smoothed(BertForSequenceClassification):
    """Label smoothing inside the model."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        outputs = super().forward(input_ids, attention_mask)
        if labels is not None:
            outputs.loss = F.cross_entropy(outputs.logits, labels, label_smoothing=0.2)
        return outputs


def test_unknown_loss_is_scored_one_example_at_a_time(caplog):
    """Guards against scoring plain cross-entropy where the model is trained by another loss."""
    model = Smoothed(tiny_bert().config)
    model.load_state_dict(tiny_bert().state_dict())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("query" in name or "classifier" in name)
    model.double()
    examples = examples_for(tiny_bert(), 6)
    expected = naive_scores(model, examples, 2, lambda m, e: m(**pad([e])).loss)
    assert_scores_close(scored(model, batches_of(examples, 4)), expected)
    (message,) = messages(caplog)
    assert message.endswith("the model's own loss is not one of the known per-example losses")


# --- zeros, and LoRA's start ---------------------------------------------------------------


def test_zero_scores_are_reported_by_name(caplog):
    """Guards against silence at LoRA's start, where every A scores 0 and only B can win."""
    model = with_lora(tiny_bert(), target_modules=["query", "value"])
    scores = scored(model, batches_of(examples_for(model, 4), 4))
    sides = [name for name in scores if "lora_A" in name]
    assert not any(scores[name].any() for name in sides)
    assert all(score.any() for name, score in scores.items() if name not in sides)
    (message,) = messages(caplog)
    assert message.startswith(f"All scores are 0 for 4 of 10 tensors: {', '.join(sides)}. ")
    assert "LoRA's start" in message
    assert "score_with_perturbed_b" in message
    assert "PiSSA" in message


class Net(nn.Module):
    """One layer under LoRA between two others."""

    def __init__(self):
        super().__init__()
        self.embed, self.lin, self.out = nn.Embedding(9, 5), nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.lin(self.embed(x).mean(1))))


RANK, SEEDS, ALPHA = 16, 40, 32


def lora_at_start(target):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Net()
        with torch.no_grad():
            net.embed.weight.mul_(2)
        x, y = torch.randint(0, 9, (12, 4)), torch.randint(0, 3, (12,))
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[target])
        lora = peft.get_peft_model(copy.deepcopy(net), config).double()
    return net.double(), lora, x, y


@pytest.mark.parametrize("statistic", ["squared", "absolute"])
@pytest.mark.parametrize("target", ["lin", "embed"])
def test_perturbed_b_estimates_the_full_weights_column_norms(target, statistic, caplog):
    """Guards the mathematics of the docstring: scale c^2, division by std^2, sum over the rows of
    the squared gradient of W; for embeddings A is the zero side and B the one to score."""
    net, lora, x, y = lora_at_start(target)
    squares = torch.zeros_like(net.get_submodule(target).weight)
    roots = []
    for i in range(len(x)):
        net.zero_grad()
        F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]).backward()
        squares += net.get_submodule(target).weight.grad ** 2 / len(x)
        roots.append(net.get_submodule(target).weight.grad.square())
    c = ALPHA / RANK
    axis = 0  # the rows o of W that A's column m meets: lin.weight[o, m], and embed.weight[v, d]
    if statistic == "squared":
        expected = c**2 * squares.sum(axis)
    else:  # E|N(0, s^2)| = s sqrt(2 / pi)
        means = torch.stack([root.sum(axis).sqrt() for root in roots]).mean(0)
        expected = c * means * (2 / torch.pi) ** 0.5
    batches = [(x[i : i + 5], y[i : i + 5]) for i in range(0, 12, 5)]
    start = scored(lora, batches, statistic=statistic)
    caplog.clear()
    total = {name: torch.zeros_like(score) for name, score in start.items()}
    for seed in range(SEEDS):
        scores = score_with_perturbed_b(
            lora, batches, seed=seed, statistic=statistic, progress=False
        )
        for name, score in scores.items():
            total[name] += score / SEEDS
    assert not messages(caplog, "All scores are 0")
    (zero,) = [name for name, score in start.items() if score.any()]
    (other,) = [name for name, score in start.items() if not score.any()]
    assert "lora_B" in zero if target == "lin" else "lora_embedding_A" in zero
    # RANK * SEEDS independent chi-squared numbers per column, of one degree of freedom at worst.
    estimate = total[other].mean(0 if target == "lin" else 1)
    bound = 5 * (2 / (RANK * SEEDS)) ** 0.5
    torch.testing.assert_close(estimate, expected, rtol=bound, atol=1e-12)
    for name in (zero,):
        assert (total[name] - start[name]).norm() < 1e-2 * start[name].norm()


@pytest.mark.parametrize("std", [1e-4, 1e-2])
def test_perturbed_scores_do_not_depend_on_std(std):
    """Guards the division by std^2, with one seed and so to first order exactly."""
    _, lora, x, y = lora_at_start("lin")
    reference = score_with_perturbed_b(lora, [(x, y)], std=1e-3, progress=False)
    scores = score_with_perturbed_b(lora, [(x, y)], std=std, progress=False)
    for name, score in scores.items():
        torch.testing.assert_close(score, reference[name], rtol=0.1, atol=0.05 * score.max())


def test_perturbation_leaves_what_is_not_zero():
    """Guards pairs that trained already: scored as they are, restored to what they were."""
    model = adapted(tiny_bert)
    batches = batches_of(examples_for(model, 4), 2)
    expected = scored(model, batches)
    assert_scores_close(score_with_perturbed_b(model, batches, progress=False), expected, 0)


def test_perturbation_is_seeded():
    """Guards against a perturbation by the global generator: other seeds alone change A."""
    _, lora, x, y = lora_at_start("lin")
    first, again, other = (
        score_with_perturbed_b(lora, [(x, y)], seed=seed, progress=False) for seed in (0, 0, 1)
    )
    assert_scores_close(again, first, 0)
    (a,) = [name for name in first if "lora_A" in name]
    assert not torch.allclose(first[a], other[a], rtol=0.1)


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan")])
def test_perturbation_of_no_size_is_refused(model, std):
    """Guards against a division by 0."""
    with pytest.raises(ValueError, match=rf"std={std}: must be above 0"):
        score_with_perturbed_b(model, [], std=std)


# --- wrong input ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "exact"}, "estimator='exact': choose one of 'empirical', 'true'"),
        ({"statistic": "cubed"}, "statistic='cubed': choose one of 'squared', 'absolute'"),
        ({"token_reduction": "max"}, "token_reduction='max': choose one of 'mean', 'sum'"),
        ({"num_samples": 0}, "num_samples=0: must be at least 1, or None"),
        ({"num_samples": -3}, "num_samples=-3: must be at least 1, or None"),
        ({"estimator": "true", "label_samples": 0}, "label_samples=0: must be at least 1, or None"),
        ({"label_samples": 2}, "label_samples=2: labels are drawn only with estimator='true'"),
        ({"estimator": "true", "loss_fn": not_finite}, "which a loss_fn does not give"),
    ],
)
def test_wrong_options_are_refused(model, options, message):
    """Guards against an option that is silently ignored or fails far inside."""
    with pytest.raises(ValueError, match=re.escape(message)):
        scored(model, batches_of(examples_for(model, 2), 2), **options)


def test_nothing_trainable_is_refused(model):
    """Guards against an empty result."""
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="the model has no trainable parameter: add an adapter"):
        scored(model, batches_of(examples_for(model, 2), 2))


@pytest.mark.parametrize("score", [calculate_fisher_information, score_with_perturbed_b])
def test_empty_loader_is_refused(model, score):
    """Guards against a division by 0 examples, or scores of 0."""
    with pytest.raises(ValueError, match="the calibration dataloader is empty"):
        score(model, [], progress=False)


@pytest.mark.parametrize("use_loss_fn", [False, True])
@pytest.mark.parametrize("layer", [nn.Linear, BehindItsBack])
def test_loss_that_is_not_finite_names_the_example(layer, use_loss_fn):
    """Guards the number across batches: the sixth example is bad, and with it every score."""
    net, x, y = layer(2, 3), torch.ones(8, 2), torch.zeros(8).long()
    x[5] = torch.nan
    options = (
        {"loss_fn": lambda o, b: F.cross_entropy(o, b[1], reduction="none")} if use_loss_fn else {}
    )
    batches = [(x[i : i + 3], y[i : i + 3]) for i in range(0, 8, 3)]
    with pytest.raises(ValueError, match="the loss of calibration example 5 is nan"):
        scored(net, batches, **options)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda o, b: o.logits.sum(), r"loss_fn returned \(\) for 4 examples"),
        (lambda o, b: o.logits, r"loss_fn returned \(4, 3\) for 4 examples"),
        (lambda o, b: 1.0, r"loss_fn returned float for 4 examples"),
        (lambda o, b: torch.ones(4), "does not depend on any trainable parameter"),
        (lambda o, b: o.logits.detach().sum(1), "does not depend on any trainable parameter"),
    ],
    ids=["scalar", "by class", "number", "constant", "detached"],
)
def test_loss_fn_of_the_wrong_kind_is_refused(model, loss_fn, message):
    """Guards against the mean of a batch taken for an example's loss."""
    with pytest.raises(ValueError, match=message):
        scored(model, batches_of(examples_for(model, 4), 4), loss_fn=loss_fn)


def test_positions_that_take_the_shape_of_their_input():
    """Guards BART's positions: after the first batch, backward went past them."""
    model = tiny_bart().double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("embed_positions" in name or "shared" in name)
    examples = examples_for(model, 4)
    assert_scores_close(
        calculate_fisher_information(model, batches_of(examples, 1), progress=False),
        naive_scores(model, examples),
    )


def test_the_progress_bar_ends_full(capsys):
    """Guards against a bar that stops at 2% because there are fewer examples than asked for."""
    model = with_lora(tiny_bert())
    calculate_fisher_information(model, batches_of(examples_for(model, 3), 2), num_samples=100)
    assert "3/3" in capsys.readouterr().err.splitlines()[-1]
