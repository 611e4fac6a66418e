"""The loss is what the model says it is: of several examples and of a whole batch."""

import pytest
import torch
import torch.nn.functional as F
import transformers as tr
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from fish_tuning import calculate_fisher_information
from fish_tuning.scoring.losses import whole_batches
from tests.models import (
    assert_scores_close,
    batches_of,
    examples_for,
    naive_scores,
    pad,
    tiny_bert,
    tiny_llama,
    with_lora,
)

N, D, C = 9, 4, 3
WEIGHTS = torch.tensor([1.0, 10.0, 0.1]).double()
LABELS = torch.arange(N) % C
SLOW = "one example at a time"


def scored(model, loader, **options):
    return calculate_fisher_information(model, loader, progress=False, **options)


def each(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none")


class Classifier(nn.Module):
    """A linear classifier with a loss of its own."""

    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.loss = nn.Linear(D, C).double(), loss

    def forward(self, x, labels=None, weight=None):
        logits = self.lin(x)
        arguments = (logits, labels) if weight is None else (logits, labels, weight)
        loss = None if labels is None else self.loss(*arguments)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def batches(labels=LABELS, size=4, **more):
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(1)).double()
    columns = {"x": x, "labels": labels, **more}
    return [{k: v[i : i + size] for k, v in columns.items()} for i in range(0, N, size)]


def loop(model, loader):
    """One forward and backward pass for each row of the batches."""
    rows = [
        {key: value[i : i + 1] for key, value in batch.items()}
        for batch in loader
        for i in range(len(batch["labels"]))
    ]
    return naive_scores(model, rows, loss=lambda model, row: model(**row).loss)


OF_EXAMPLES = {
    "weighted": lambda z, y: (each(z, y) * WEIGHTS[y]).mean(),
    "smoothing": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "focal": lambda z, y: ((1 - (-each(z, y)).exp()) ** 2 * each(z, y)).mean(),
    "penalty": lambda z, y: each(z, y).mean() + 0.1 * z.square().mean(),
    "sum": lambda z, y: each(z, y).sum(),
    "per example": each,
}
OF_THE_BATCH = {
    "class weights": lambda z, y: F.cross_entropy(z, y, weight=WEIGHTS),
    "in-batch negatives": lambda z, y: F.cross_entropy(z @ z.T, torch.arange(len(z))),
    "centred": lambda z, y: (z - z.mean(0)).square().mean() + each(z, y).mean(),
}


@pytest.mark.parametrize("labels", [LABELS, LABELS.sort()[0]], ids=["mixed", "sorted"])
@pytest.mark.parametrize("loss", OF_EXAMPLES)
def test_losses_of_examples(loss, labels):
    """Guards against a weight that the first example, or the first batch, does not show."""
    model, loader = Classifier(OF_EXAMPLES[loss]), batches(labels)
    assert_scores_close(scored(model, loader), loop(model, loader))


@pytest.mark.parametrize("labels", [LABELS, LABELS.sort()[0]], ids=["mixed", "sorted"])
@pytest.mark.parametrize("loss", OF_THE_BATCH)
def test_losses_of_a_batch_are_refused(loss, labels):
    """Guards against scores of another loss than the one that is trained."""
    with pytest.raises(ValueError, match=r"do not add up to it: .* pass a loss_fn"):
        scored(Classifier(OF_THE_BATCH[loss]), batches(labels, size=5))


def test_a_sum_over_examples_takes_one_pass(caplog):
    """Guards against the slow way where the loss is a plain one."""
    scored(Classifier(OF_EXAMPLES["sum"]), batches())
    assert SLOW not in caplog.text


@pytest.mark.parametrize("first", [0, 1, 4])
def test_weights_in_the_batch(first):
    """Guards against taking the weight of the first example for that of all."""
    weight = torch.tensor([1, 5, 0.1, 0.5, 3, 1, 1, 2, 2]).double().roll(-first)
    model = Classifier(lambda z, y, w=WEIGHTS[:1]: (each(z, y) * w).mean())
    loader = batches(weight=weight)
    assert_scores_close(scored(model, loader), loop(model, loader))


def test_weights_that_come_late():
    """Guards language models, whose loss is not compared in every batch: an entry that may be
    a weight is."""

    class Weighted(tr.LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, labels=None, weight=None, **_):
            out = super().forward(input_ids=input_ids, attention_mask=attention_mask)
            if labels is not None:
                logits, labels = out.logits[:, :-1].transpose(1, 2), labels[:, 1:]
                tokens = F.cross_entropy(logits, labels, reduction="none")
                counts = (labels != -100).sum(1)
                out.loss = (tokens.sum(1) / counts * weight).mean()
            return out

    model = with_lora(Weighted(tiny_llama().config), init_lora_weights=False).double()
    loader = batches_of(examples_for(model, 6), 2)
    for batch, weights in zip(loader, ([1, 1], [1, 1], [2, 0.5]), strict=True):
        batch["weight"] = torch.tensor(weights).double()
    assert_scores_close(scored(model, loader), loop(model, loader))


def rare_token(out, labels):
    """The mean over all tokens, in which token 2 counts five times."""
    z, y = out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return ((1 + 4 * (y == 2)) * each(z, y)).mean()


def positives(out, labels):
    weight = 10 * torch.ones(C, dtype=torch.float64)
    return F.binary_cross_entropy_with_logits(out.logits, labels, pos_weight=weight)


def outliers(out, labels):
    return 2 * F.huber_loss(out.logits, labels, delta=5.0)


LATE = {
    "rare token": (rare_token, tiny_llama),
    "positives": (positives, tiny_bert),
    "outliers": (outliers, tiny_bert),
}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("loss", LATE)
def test_labels_that_come_late(loss, size):
    """Guards losses of a model's own, whose first batches may look like a plain one."""
    own, build = LATE[loss]

    class Own(type(build())):
        def forward(self, input_ids=None, attention_mask=None, labels=None, **_):
            out = super().forward(input_ids=input_ids, attention_mask=attention_mask)
            out.loss = None if labels is None else own(out, labels)
            return out

    task = None if build is tiny_llama else "SEQ_CLS"
    model = with_lora(Own(build().config), init_lora_weights=False, task_type=task).double()
    ids = torch.randint(3, 40, (6, 5), generator=torch.Generator().manual_seed(1))
    labels = torch.zeros(6, C, dtype=torch.float64)
    if loss == "rare token":
        ids[3:, 2] = 2
        labels = ids
    else:
        labels[3:] = 20 if loss == "outliers" else 1
    columns = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    loader = [{k: v[i : i + size] for k, v in columns.items()} for i in range(0, 6, size)]
    assert_scores_close(scored(model, loader), loop(model, loader))


class Late(nn.Module):
    """Logits for each example or token, and a loss whose difference shows late."""

    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.loss = nn.Linear(D, C).double(), loss

    def forward(self, x, labels=None):
        logits = self.lin(x)
        loss = None if labels is None else self.loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def shifted(logits, labels, reduction="mean"):
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction=reduction)


T = 5
RARE = torch.zeros(8, T).long()
RARE[4:, 2], RARE[6, 4] = 1, 2
ONE_LABEL = torch.full((8, T), -100)
ONE_LABEL[:, 2], ONE_LABEL[4:, 3] = 1, 2
FAR = torch.randn(8, C, generator=torch.Generator().manual_seed(2)).double().clamp(-1, 1)
FAR[4:] += 9
POSITIVES = (torch.arange(24).view(8, C) % 5 == 0).double()
POSITIVES[:4] = 0

SHOWN_LATE = {
    "weighted tokens": (
        lambda z, y: (F.cross_entropy(z.mT, y, reduction="none") * WEIGHTS[y]).mean(),
        RARE,
    ),
    "weighted next tokens": (
        lambda z, y: (shifted(z, y, "none") * WEIGHTS[y[:, 1:]]).mean(),
        RARE,
    ),
    "sum over the tokens": (lambda z, y: shifted(z, y, "none").sum(1).mean(), ONE_LABEL),
    "positives": (
        lambda z, y: F.binary_cross_entropy_with_logits(z, y, pos_weight=WEIGHTS),
        POSITIVES,
    ),
    "Huber": (lambda z, y: 2 * F.huber_loss(z, y, delta=4.0), FAR),
}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", SHOWN_LATE)
def test_a_loss_that_only_later_batches_show(name, size):
    """Guards rare classes, positives and outliers: the first batch has the plain loss."""
    loss, labels = SHOWN_LATE[name]
    shape = (8, T, D) if labels.dim() == 2 and not labels.is_floating_point() else (8, D)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()
    loader = [{"x": x[i : i + size], "labels": labels[i : i + size]} for i in range(0, 8, size)]
    model = Late(loss)
    assert_scores_close(scored(model, loader), loop(model, loader))


def test_class_weights_that_only_later_batches_show():
    """Guards a mean that class weights divide: it is refused, or scored in batches of one."""
    x = torch.randn(8, T, D, generator=torch.Generator().manual_seed(1)).double()
    model = Late(lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), weight=WEIGHTS))
    loader = [{"x": x[i : i + 4], "labels": RARE[i : i + 4]} for i in (0, 4)]
    with pytest.raises(ValueError, match=r"not the mean of its examples' losses.*\(batch_size=1"):
        scored(model, loader)
    singles = [{"x": x[i : i + 1], "labels": RARE[i : i + 1]} for i in range(8)]
    assert_scores_close(scored(model, singles), loop(model, singles))


def test_a_loss_that_differs_after_unchecked_batches_is_refused(monkeypatch):
    """Guards against sums that already have the scores of another loss."""
    model = with_lora(tiny_llama(), init_lora_weights=False)
    first, second = batches_of(examples_for(model, 6), 3)
    loader = [first, first, {key: second[key] for key in ("input_ids", "labels")}]
    answers = iter([True, False])
    monkeypatch.setattr(whole_batches, "explains", lambda *_: next(answers))
    with pytest.raises(ValueError, match=r"examples 6 to 8 is not the likelihood .* first, or"):
        scored(model, loader)


@pytest.mark.parametrize("aux", [False, True])
def test_a_routers_loss(aux):
    """Guards against a balance of the whole batch that no example has."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    config = tr.MixtralConfig(**sizes, **heads, output_router_logits=aux, initializer_range=0.2)
    lora = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    model = with_lora(tr.MixtralForCausalLM(config), **lora)
    examples = examples_for(model, 4)
    if aux:
        with pytest.raises(ValueError, match=r"Leave that term out \(output_router_logits=False\)"):
            scored(model, [pad(examples)])
    else:
        assert_scores_close(scored(model, [pad(examples)]), naive_scores(model, examples), 1e-3)


def test_mean_over_the_tokens_of_a_batch_takes_one_pass(caplog):
    """Guards causal language models: their loss is a mean over tokens, not over examples."""
    model = with_lora(tiny_llama(), init_lora_weights=False).double()
    examples = examples_for(model, 6)
    scores = scored(model, batches_of(examples, 6))
    assert_scores_close(scores, naive_scores(model, examples))
    assert SLOW not in caplog.text


class Mixing(Classifier):
    """Its examples see each other."""

    def forward(self, x, labels=None):
        return super().forward(x + x.mean(0), labels)


def test_examples_that_see_each_other_are_refused():
    """Guards against gradients of a row that are not those of its example."""
    model = Mixing(lambda z, y: each(z, y).mean())
    with pytest.raises(ValueError, match=r"example 0 has the loss .* use batches of one example"):
        scored(model, batches())
    loader = batches(size=1)
    assert_scores_close(scored(model, loader), loop(model, loader))


def test_a_loss_fn_that_compares_examples_is_refused():
    """Guards in-batch negatives: the loss of one example moves the outputs for all."""

    def loss_fn(outputs, batch):
        return each(outputs.logits @ outputs.logits.T, torch.arange(len(outputs.logits)))

    with pytest.raises(ValueError, match="from the outputs for other examples"):
        scored(Classifier(each), batches(), loss_fn=loss_fn)


# --- labels of -100 -------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["empirical", "true"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_examples_of_no_class_score_zero(size, estimator):
    """Guards -100 as a class: the model ignores such an example."""
    model = with_lora(tiny_bert(), init_lora_weights=False).double()
    examples = examples_for(model, 5)
    for i in (0, 3):
        examples[i]["labels"] = torch.tensor(-100)
    scores = scored(model, batches_of(examples, size), estimator=estimator)
    labelled = [examples[i] for i in (1, 2, 4)]
    expected = scored(model, batches_of(labelled, 3), estimator=estimator)
    assert_scores_close(scores, {name: score * 3 / 5 for name, score in expected.items()})


def test_ignored_examples_of_an_unknown_loss_score_zero():
    """Guards the slow way, where the model's own loss of such an example is NaN."""
    smoothed = Classifier(lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1))
    labels = LABELS.clone()
    labels[[0, 5]] = -100
    loader = batches(labels)
    kept = [{k: v[b["labels"] != -100] for k, v in b.items()} for b in loader]
    expected = {n: s * (N - 2) / N for n, s in loop(smoothed, kept).items()}
    assert_scores_close(scored(smoothed, loader), expected)


@pytest.mark.parametrize("own", [False, True], ids=["plain", "own loss"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_examples_labelled_at_their_first_token_score_zero(size, own):
    """Guards a label that nothing predicts: alone the model's loss of such an example is NaN."""

    class Penalised(tr.LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, labels=None, **_):
            outputs = super().forward(input_ids, attention_mask)
            if labels is not None:
                z, y = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
                penalty = z.logsumexp(-1)[y != -100].square().mean()
                outputs.loss = F.cross_entropy(z, y) + 0.1 * penalty
            return outputs

    model = Penalised(tiny_llama().config) if own else tiny_llama()
    model = with_lora(model, init_lora_weights=False).double()
    examples = examples_for(model, 4, shortest=6, longest=6)
    for i in (0, 2):
        examples[i]["labels"][1:] = -100
    labelled = [pad([examples[i]]) for i in (1, 3)]
    expected = naive_scores(model, labelled, loss=lambda model, row: model(**row).loss)
    scores = scored(model, batches_of(examples, size))
    assert_scores_close(scores, {name: score / 2 for name, score in expected.items()}, 2e-5)


def test_no_class_at_all_is_refused():
    """Guards against scores of 0 for a split whose labels are hidden."""
    model = with_lora(tiny_bert(), init_lora_weights=False)
    examples = examples_for(model, 4)
    for example in examples:
        example["labels"] = torch.tensor(-100)
    with pytest.raises(ValueError, match="all labels of the 4 calibration examples are -100"):
        scored(model, batches_of(examples, 2))


# --- nothing to score by --------------------------------------------------------------------


def test_all_scores_zero_is_an_error():
    """Guards against a mask by position."""

    class Constant(Classifier):
        def forward(self, x, labels=None):
            outputs = super().forward(x, labels)
            return SequenceClassifierOutput(loss=outputs.loss * 0, logits=outputs.logits * 0)

    with pytest.raises(ValueError, match="every score is 0: no gradient reaches"):
        scored(Constant(lambda z, y: each(z, y).mean()), batches())


def test_half_of_lora_alone_is_an_error():
    """Guards against scores of A while B is 0 and frozen."""
    model = with_lora(tiny_llama())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_A" in name)
    with pytest.raises(ValueError, match="of LoRA only A is trainable"):
        scored(model, batches_of(examples_for(model, 4), 2))


def test_a_detached_loss_is_an_error():
    """Guards against a loss whose gradient nobody computes."""
    model = Classifier(lambda z, y: each(z, y).mean().detach() * 2)
    with pytest.raises(ValueError, match="the loss does not depend on any trainable parameter"):
        scored(model, batches())


@pytest.mark.parametrize("shape", [(N, C), (N, 1), (N,)])
def test_targets_without_a_loss_are_numbers(shape):
    """Guards against reading numbers as yes or no where the model returns no loss to tell."""
    torch.manual_seed(0)
    outputs = shape[1] if len(shape) > 1 else 1
    x, y, net = torch.randn(N, D).double(), torch.randn(shape).double(), nn.Linear(D, outputs)
    net = net.double()
    expected = naive_scores(
        net,
        [{"x": x[i : i + 1], "y": y[i : i + 1]} for i in range(N)],
        loss=lambda net, row: F.mse_loss(net(row["x"]), row["y"].reshape(1, -1)),
    )
    assert_scores_close(scored(net, [(x[:5], y[:5]), (x[5:], y[5:])]), expected)
