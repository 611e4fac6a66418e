"""Which loss is scored: the reading of labels, the true Fisher information, drawn labels."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from fish_tuning import calculate_fisher_information
from tests.models import (
    assert_scores_close,
    batches_of,
    examples_for,
    naive_scores,
    pad,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    with_lora,
)

N, D = 9, 4


def scored(model, loader, **options):
    return calculate_fisher_information(model, loader, progress=False, **options)


def linear(outputs, bias=True):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(D, outputs, bias).double()


@pytest.fixture
def x():
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class WithLoss(nn.Module):
    """A linear model that returns the loss it is trained with, as transformers models do."""

    def __init__(self, outputs, loss, dtype=torch.float64):
        super().__init__()
        self.lin, self.loss = linear(outputs).to(dtype), loss

    def forward(self, x, labels=None):
        logits = self.lin(x)
        loss = None if labels is None else self.loss(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def batches(x, y, size=4):
    return [{"x": x[i : i + size], "labels": y[i : i + size]} for i in range(0, N, size)]


def outer(weights, x):
    """mean_i weights_i x_i^2, for every output: (n, c), (n, d) -> (c, d)."""
    return torch.einsum("nc,nd->cd", weights, x.square()) / len(x)


def assert_weights(scores, weights, x, prefix="lin."):
    expected = {f"{prefix}weight": outer(weights, x), f"{prefix}bias": weights.mean(0)}
    assert_scores_close(scores, expected)


# --- closed forms --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4, 9])
@pytest.mark.parametrize("classes", [2, 5])
def test_true_fisher_of_logistic_regression(x, classes, size):
    """Guards the expectation over the model's own labels: F = mean p_c (1 - p_c) x^2, whatever
    the labels of the data are."""
    net = linear(classes)
    p = net(x).softmax(-1).detach()
    for label in range(2):
        y = torch.full((N,), label)
        loader = [(x[i : i + size], y[i : i + size]) for i in range(0, N, size)]
        assert_weights(scored(net, loader, estimator="true"), p * (1 - p), x, "")


def test_true_fisher_of_independent_labels(x):
    """Guards multi-label: F = mean p_c (1 - p_c) x^2 / C^2, the loss being the mean over C."""
    model = WithLoss(3, F.binary_cross_entropy_with_logits)
    p = model.lin(x).sigmoid().detach()
    scores = scored(model, batches(x, torch.ones(N, 3).double()), estimator="true")
    assert_weights(scores, p * (1 - p) / 9, x)


@pytest.mark.parametrize("outputs", [1, 2])
def test_true_fisher_of_regression(x, outputs):
    """Guards regression: F = mean 2 / C x^2, whatever the labels are."""
    model = WithLoss(outputs, F.mse_loss)
    scores = scored(model, batches(x, torch.full((N, outputs), 3.0).double()), estimator="true")
    assert_weights(scores, torch.full((N, outputs), 2 / outputs).double(), x)


def test_true_absolute_gradient_of_logistic_regression(x):
    """Guards the weights of the absolute statistic: mean 2 p_c (1 - p_c) |x|."""
    net = linear(3)
    p = net(x).softmax(-1).detach()
    loader = [(x, torch.zeros(N).long())]
    scores = scored(net, loader, estimator="true", statistic="absolute")
    weights = 2 * p * (1 - p)
    expected = {"weight": weights.T @ x.abs() / N, "bias": weights.mean(0)}
    assert_scores_close(scores, expected)


def test_true_fisher_of_a_deep_classifier():
    """Guards several backward passes over one forward: each class's gradient, weighed."""
    model = with_lora(tiny_bert(), init_lora_weights=False).double()
    examples = examples_for(model, 5)
    with torch.no_grad():
        model.eval()
        p = torch.stack([model(**pad([e])).logits[0].softmax(-1) for e in examples])
    expected = None
    for c in range(3):
        for i, example in enumerate(examples):
            one = naive_scores(model, [{**example, "labels": torch.tensor(c)}])
            part = {name: p[i, c] * score / 5 for name, score in one.items()}
            expected = part if expected is None else {n: expected[n] + part[n] for n in part}
    for size in (1, 3):
        scores = scored(model, batches_of(examples, size), estimator="true")
        assert_scores_close(scores, expected)


# --- drawn labels --------------------------------------------------------------------------

DRAWS = 400


def test_drawn_labels_converge_to_the_exact_expectation(x):
    """Guards the sampled estimate: every entry within five of its standard errors, which follow
    from p; the mean over draws must not depend on their number."""
    net = linear(3)
    loader = [(x[i : i + 4], torch.zeros(len(x[i : i + 4])).long()) for i in range(0, N, 4)]
    exact = scored(net, loader, estimator="true")
    drawn = scored(net, loader, estimator="true", label_samples=DRAWS)
    p = net(x).softmax(-1).detach()
    # values[n, y, c]: the squared gradient of logit c if y is drawn for example n.
    values = (p[:, None] - torch.eye(3)).square()
    variance = (p[..., None] * values.square()).sum(1) - (p[..., None] * values).sum(1).square()
    errors = {
        "weight": torch.einsum("nc,nd->cd", variance, x**4).sqrt() / N / DRAWS**0.5,
        "bias": variance.sum(0).sqrt() / N / DRAWS**0.5,
    }
    for name, error in errors.items():
        distance = (drawn[name] - exact[name]).abs()
        assert (distance <= 5 * error).all()
        assert float(distance.max()) > 0


@pytest.mark.parametrize("loss", [F.mse_loss, F.binary_cross_entropy_with_logits])
def test_drawn_targets_converge_to_the_exact_expectation(x, loss):
    """Guards the sampled estimate of regression and multi-label."""
    model = WithLoss(2, loss)
    loader = batches(x, torch.tensor([[0.0, 1.0]]).expand(N, 2).double())
    exact = scored(model, loader, estimator="true")
    drawn = scored(model, loader, estimator="true", label_samples=DRAWS)
    # The square of a Gaussian varies most: variance 2 (mean of the square)^2 for each example.
    for name, score in exact.items():
        assert ((drawn[name] - score).abs() <= 5 * score * (2 / DRAWS) ** 0.5).all()
        assert not torch.equal(drawn[name], score)


@pytest.mark.parametrize("statistic", ["squared", "absolute"])
def test_mean_over_draws(statistic):
    """Guards the weight of a draw: where all draws agree, their number must not show."""
    net, x = linear(2), torch.ones(3, D, dtype=torch.float64)
    with torch.no_grad():
        # Every draw is class 0. At 30 instead of 12, its gradient p - 1 would be mostly rounding.
        net.bias.copy_(torch.tensor([12.0, 0.0]))
    loader = [(x, torch.zeros(3).long())]
    options = {"estimator": "true", "statistic": statistic}
    one = scored(net, loader, label_samples=1, **options)
    assert all(score.any() for score in one.values())
    assert_scores_close(scored(net, loader, label_samples=7, **options), one)


def drawn(model, loader, **options):
    return scored(model, loader, estimator="true", **options)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_t5])
def test_drawn_tokens_do_not_depend_on_batch_or_padding(build):
    """Guards each example's own stream: another batch size, order of batches or padding draws
    the same labels."""
    model = with_lora(build(), init_lora_weights=False).double()
    examples = examples_for(model, 7)
    one = drawn(model, batches_of(examples, 1))
    assert_scores_close(drawn(model, batches_of(examples, 3)), one)
    if build is not tiny_t5:
        assert_scores_close(drawn(model, batches_of(examples, 4, side="left")), one)
    assert_scores_close(drawn(model, batches_of(examples, 3), num_samples=7), one)
    other = drawn(model, batches_of(examples, 3), seed=1)
    more = drawn(model, batches_of(examples, 3), label_samples=2)
    empirical = scored(model, batches_of(examples, 3))
    for name, score in one.items():
        for different in (other, more, empirical):
            assert not torch.allclose(different[name], score, rtol=1e-3, atol=0)


def test_tokens_are_drawn_where_labels_are():
    """Guards the prompt: it has no label, so what it says there must not be scored."""
    model = with_lora(tiny_gpt2(), init_lora_weights=False).double()
    examples = examples_for(model, 4)
    expected = drawn(model, batches_of(examples, 4))
    for example in examples:
        labels = example["labels"]
        example["labels"] = torch.where(labels == -100, labels, (labels + 7) % 40)
    assert_scores_close(drawn(model, batches_of(examples, 4)), expected)


def test_token_classification_draws_labels():
    """Guards the true estimator of a task whose exact sum would be too long."""
    model = with_lora(tiny_bert(task="TokenClassification"), init_lora_weights=False).double()
    examples = examples_for(model, 5)
    one = drawn(model, batches_of(examples, 1), label_samples=2)
    assert_scores_close(drawn(model, batches_of(examples, 3), label_samples=2), one)


# --- which loss ----------------------------------------------------------------------------


def cross_entropy(logits, y):
    return F.cross_entropy(logits, y)


def squared(logits, y):
    return F.mse_loss(logits.squeeze(), y.squeeze())


def gaussian(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


READINGS = {
    "classes": (3, cross_entropy, lambda g: torch.randint(0, 3, (N,), generator=g)),
    "32-bit classes": (3, cross_entropy, lambda g: torch.randint(0, 3, (N,), generator=g)),
    "numbers": (1, squared, lambda g: gaussian(g, N)),
    "numbers (b, 1)": (1, squared, lambda g: gaussian(g, N, 1)),
    "integers as numbers": (1, squared, lambda g: torch.randint(0, 5, (N,), generator=g)),
    "vectors": (2, squared, lambda g: gaussian(g, N, 2)),
    "vectors in [0, 1]": (2, squared, lambda g: gaussian(g, N, 2).sigmoid()),
    "label sets": (
        2,
        F.binary_cross_entropy_with_logits,
        lambda g: (gaussian(g, N, 2) > 0).double(),
    ),
    "one yes or no": (
        1,
        F.binary_cross_entropy_with_logits,
        lambda g: (gaussian(g, N, 1) > 0).double(),
    ),
    "soft classes": (2, cross_entropy, lambda g: gaussian(g, N, 2).softmax(-1)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reading", READINGS)
def test_labels_are_read_as_the_model_reads_them(x, reading, dtype):
    """Guards against another loss that fits the shapes: the model's own decides, in bfloat16
    too, where several come close."""
    outputs, loss, make = READINGS[reading]
    y = make(torch.Generator().manual_seed(0))
    model = WithLoss(outputs, lambda logits, y: loss(logits.double(), y).to(dtype), dtype)
    expected = {name: torch.zeros_like(p) for name, p in model.double().named_parameters()}
    x = x.to(dtype).double()
    for i in range(N):
        model.zero_grad()
        loss(model(x[i : i + 1]).logits, y[i : i + 1]).backward()
        for name, parameter in model.named_parameters():
            expected[name] += parameter.grad**2 / N
    model.zero_grad()
    scores = scored(model.to(dtype), batches(x.to(dtype), y))
    for name, score in scores.items():
        distance = (score - expected[name]).norm() / expected[name].norm()
        assert distance < (1e-9 if dtype == torch.float64 else 0.1), name


@pytest.mark.parametrize(
    ("outputs", "labels", "loss"),
    [
        (3, torch.tensor([0, 2, 1] * 3), F.cross_entropy),
        (1, torch.linspace(0, 2, N).double(), squared),
        (1, torch.linspace(0, 2, N).double()[:, None], squared),
        (2, torch.ones(N, 2).double(), F.binary_cross_entropy_with_logits),
    ],
    ids=["classes", "numbers", "numbers (b, 1)", "label sets"],
)
def test_models_without_a_loss_are_read_as_transformers_would(x, outputs, labels, loss):
    """Guards against taking one output for a yes or no: transformers' one label is a number."""
    plain, own = linear(outputs), WithLoss(outputs, loss)
    loader = [(b["x"], b["labels"]) for b in batches(x, labels)]
    scores = scored(plain, loader)
    expected = scored(own, batches(x, labels))
    assert_scores_close({f"lin.{name}": score for name, score in scores.items()}, expected)


def test_a_batch_of_one_output_keeps_its_shape():
    """Guards transformers' squeeze() of one regression output in a batch of one."""
    model = with_lora(tiny_bert(1), init_lora_weights=False).double()
    examples = examples_for(model, 3)
    expected = naive_scores(model, examples)
    for size in (1, 2, 3):
        assert_scores_close(scored(model, batches_of(examples, size)), expected)


@pytest.mark.parametrize("weight", [1.0, 0.0], ids=["a start", "zero head"])
def test_gradient_of_the_models_loss_is_what_counts(x, weight):
    """Guards against reading by the value alone: where a head starts at 0 a loss with a
    temperature has the value of cross-entropy, but another gradient."""

    def tempered(logits, y):
        return F.cross_entropy(logits / 2, y)

    model = WithLoss(3, tempered)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(weight)
    y = torch.arange(N) % 3
    g = (model.lin(x) / 2).softmax(-1).detach() - F.one_hot(y, 3)
    assert_weights(scored(model, batches(x, y)), (g / 2).square(), x)


def test_closest_value_decides_without_a_gradient(x):
    """Guards against the first loss within the tolerance, where the model computes its loss of
    other tensors than the logits it returns: at 0 both of these are near log 2."""

    class Apart(WithLoss):
        def forward(self, x, labels=None):
            outputs = super().forward(x, labels)
            outputs.logits = outputs.logits.clone()
            return outputs

    model = Apart(2, F.mse_loss)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    y = torch.full((N, 2), 0.83256).double()
    assert_weights(scored(model, batches(x, y)), y.square(), x)


def test_own_loss_that_is_not_finite_is_refused(x):
    """Guards against a likelihood that "agrees" with NaN."""
    model = WithLoss(3, lambda logits, y: F.cross_entropy(logits, y) * torch.nan)
    with pytest.raises(ValueError, match="the loss of calibration example 0 is nan"):
        scored(model, batches(x, torch.arange(N) % 3))


class Penalised(BertForSequenceClassification):
    """A loss with a term that is no likelihood."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        outputs = super().forward(input_ids, attention_mask, labels=labels)
        if labels is not None:
            outputs.loss = outputs.loss + outputs.logits.square().mean()
        return outputs


@pytest.mark.parametrize(
    "options", [{"estimator": "true"}, {"estimator": "true", "label_samples": 3}]
)
def test_true_fisher_needs_a_known_likelihood(options):
    """Guards against the expectation of another model than the one that is trained."""
    model = Penalised(tiny_bert().config)
    with pytest.raises(ValueError, match="own loss is not one of the known likelihoods"):
        scored(model, batches_of(examples_for(tiny_bert(), 3), 3), **options)


def test_sum_over_tokens_needs_a_known_likelihood():
    """Guards against an option that has no effect."""
    model = Penalised(tiny_bert().config)
    with pytest.raises(ValueError, match="token_reduction='mean', or pass a loss_fn"):
        scored(model, batches_of(examples_for(tiny_bert(), 3), 3), token_reduction="sum")


# --- examples without labels ---------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["empirical", "true"])
@pytest.mark.parametrize("size", [1, 2, 6])
def test_examples_without_labels_score_zero_and_count(size, estimator, caplog):
    """Guards against NaN, or against another mean or an error at batch size 1, where a prompt
    filled the whole context and -100 is all that is left."""
    model = with_lora(tiny_llama(), init_lora_weights=False).double()
    examples = examples_for(model, 6)
    for i in (0, 1, 4):
        examples[i]["labels"] = torch.full_like(examples[i]["labels"], -100)
    scores = scored(model, batches_of(examples, size), estimator=estimator)
    if estimator == "empirical":
        expected = naive_scores(model, [examples[i] for i in (2, 3, 5)])
        expected = {name: score / 2 for name, score in expected.items()}
    else:
        expected = scored(model, batches_of(examples, 3), estimator="true")
    assert_scores_close(scores, expected)
    assert not [r for r in caplog.records if r.name.startswith("fish_tuning")]


def test_no_labels_at_all_are_refused():
    """Guards against scores of 0 for a data set whose labels are all masked."""
    model = with_lora(tiny_llama(), init_lora_weights=False)
    examples = examples_for(model, 4)
    for example in examples:
        example["labels"] = torch.full_like(example["labels"], -100)
    with pytest.raises(ValueError, match="all labels of the 4 calibration examples are -100"):
        scored(model, batches_of(examples, 2))


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (tiny_bert, r"no labels \(input_ids: .*, attention_mask: .*\): name the column 'labels'"),
        (tiny_llama, r"no labels \(input_ids: .*, attention_mask: .*\): name the column 'labels'"),
    ],
)
def test_missing_labels_are_refused(build, named):
    """Guards against an obscure error, and against scoring something that is no loss."""
    model = with_lora(build())
    loader = batches_of(examples_for(model, 4), 2)
    for batch in loader:
        del batch["labels"]
    with pytest.raises(ValueError, match=named):
        scored(model, loader)


def test_sequences_without_labels_are_refused(x):
    """Guards the same for unnamed batches."""
    with pytest.raises(ValueError, match=r"no labels \(\(9, 4\)\)"):
        scored(linear(2), [x])
    with pytest.raises(ValueError, match=r"no labels \(\(9, 4\)\)"):
        scored(linear(2), [[x]])


@pytest.mark.parametrize(
    ("outputs", "labels", "shapes"),
    [
        (3, torch.zeros(N).double(), r"\(1, 3\) and labels of shape \(1,\)"),
        (3, torch.zeros(N, 2).long(), r"\(1, 3\) and labels of shape \(1, 2\)"),
        (3, ["a"] * N, r"\(1, 3\) and labels of shape list"),
    ],
)
def test_labels_that_do_not_fit_are_refused(x, outputs, labels, shapes):
    """Guards against a broadcast that makes some loss of any labels."""
    message = f"no likelihood fits logits of shape {shapes}, and the model returns no loss"
    with pytest.raises(ValueError, match=message):
        scored(linear(outputs), [(x, labels)])


def test_no_noise_in_the_log(x, caplog):
    """Guards against warnings where nothing is wrong."""
    caplog.set_level(logging.INFO)
    scored(linear(3), [(x, torch.zeros(N).long())])
    assert not caplog.records
