"""log p(y | x) by example: values, exact expectations over labels, and drawn labels."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fish_tuning.scoring.losses.likelihood import (
    IGNORED,
    LIKELIHOODS,
    MultiLabel,
    Regression,
    SingleLabel,
    Tokens,
    generator_of,
)

SHAPES = st.tuples(st.integers(1, 5), st.integers(2, 6), st.integers(2, 5), st.integers(0, 10**6))
quick = settings(max_examples=40, deadline=None)


def generators(n, seed=0):
    return [generator_of(seed, example, 0) for example in range(n)]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(generator, *shape):
    return 3 * torch.randn(shape, generator=generator, dtype=torch.float64)


def some_ignored(labels, generator):
    return labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.4, IGNORED)


@quick
@given(SHAPES)
def test_single_label_is_torchs_cross_entropy(shape):
    """Guards the value and its scale, one value per example."""
    b, _, classes, seed = shape
    g = seeded(seed)
    logits, labels = normal(g, b, classes), torch.randint(0, classes, (b,), generator=g)
    losses = SingleLabel().losses(logits, labels)
    expected = [F.cross_entropy(logits[i : i + 1], labels[i : i + 1]) for i in range(b)]
    torch.testing.assert_close(losses, torch.stack(expected))


@quick
@given(SHAPES, st.booleans(), st.sampled_from(["mean", "sum"]))
def test_tokens_are_torchs_cross_entropy(shape, shifted, reduction):
    """Guards the shift, the -100s and the division by each example's own number of tokens; an
    example without labels is worth 0, not NaN."""
    b, t, classes, seed = shape
    g = seeded(seed)
    logits = normal(g, b, t, classes)
    labels = some_ignored(torch.randint(0, classes, (b, t), generator=g), g)
    losses = Tokens(shifted, reduction).losses(logits, labels)
    for i in range(b):
        x, y = (logits[i, :-1], labels[i, 1:]) if shifted else (logits[i], labels[i])
        if bool((y == IGNORED).all()):
            assert losses[i] == 0
        else:
            torch.testing.assert_close(losses[i], F.cross_entropy(x, y, reduction=reduction))


def test_tokens_after_virtual_ones():
    """Guards against reading prompt tuning's logits from the wrong end: they are more than the
    labels, in front."""
    g = seeded(0)
    logits, labels = normal(g, 2, 7, 5), torch.randint(0, 5, (2, 4), generator=g)
    for i, loss in enumerate(Tokens(shifted=True).losses(logits, labels)):
        torch.testing.assert_close(loss, F.cross_entropy(logits[i, 2:6], labels[i]))
    for i, loss in enumerate(Tokens(shifted=False).losses(logits, labels)):
        torch.testing.assert_close(loss, F.cross_entropy(logits[i, 3:], labels[i]))


@quick
@given(SHAPES)
def test_regression_and_multi_label_are_torchs(shape):
    """Guards the mean over outputs, and labels of shape (b,) for one output."""
    b, _, outputs, seed = shape
    g = seeded(seed)
    logits, targets = normal(g, b, outputs), normal(g, b, outputs)
    yes = (targets > 0).double()
    squared, bce = Regression().losses(logits, targets), MultiLabel().losses(logits, yes)
    for i in range(b):
        torch.testing.assert_close(squared[i], F.mse_loss(logits[i], targets[i]))
        torch.testing.assert_close(bce[i], F.binary_cross_entropy_with_logits(logits[i], yes[i]))
    one = Regression().losses(logits[:, :1], targets[:, 0])
    torch.testing.assert_close(one, (logits[:, 0] - targets[:, 0]) ** 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    """Guards against losses rounded to half precision."""
    g = seeded(0)
    half = normal(g, 4, 3).to(dtype)
    sequences = normal(g, 4, 2, 3).to(dtype)
    labels = torch.tensor([0, 1, 2, 0])
    tokens = labels[:, None].expand(4, 2)
    for kind, logits, y in (
        (SingleLabel(), half, labels),
        (Tokens(shifted=False), sequences, tokens),
        (Regression(), half, half.float()),
        (MultiLabel(), half, half.float().sigmoid()),
    ):
        losses = kind.losses(logits, y)
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses, kind.losses(logits.float(), y), rtol=0, atol=0)


def gradients(loss, logits):
    return torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0]


def from_expectation(kind, logits, power):
    """sum_j |grad loss_j|^power by logit of each example."""
    losses = kind.expectation(logits, power)
    assert all(loss.shape == logits.shape[:1] for loss in losses)
    return sum(gradients(loss, logits).abs() ** power for loss in losses)


@quick
@given(SHAPES, st.sampled_from([1, 2]))
def test_expectation_of_a_single_label(shape, power):
    """Guards the weights: p_c must not be squared, nor carry a gradient."""
    b, _, classes, seed = shape
    logits = normal(seeded(seed), b, classes).requires_grad_()
    expected = torch.zeros_like(logits)
    p = logits.softmax(-1).detach()
    for c in range(classes):
        loss = SingleLabel().losses(logits, torch.full((b,), c))
        expected += p[:, c : c + 1] * gradients(loss, logits).abs() ** power
    actual = from_expectation(SingleLabel(), logits, power)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    if power == 2:
        torch.testing.assert_close(actual, p * (1 - p), rtol=1e-6, atol=1e-9)


@quick
@given(SHAPES)
def test_expectation_of_multi_label(shape):
    """Guards against the sum over all 2^C label sets."""
    b, _, classes, seed = shape
    logits = normal(seeded(seed), b, classes).requires_grad_()
    p = logits.sigmoid().detach()
    expected = torch.zeros_like(logits)
    for number in range(2**classes):
        y = torch.tensor([number >> c & 1 for c in range(classes)]).double().expand(b, -1)
        probability = (y * p + (1 - y) * (1 - p)).prod(1, keepdim=True)
        expected += probability * gradients(MultiLabel().losses(logits, y), logits) ** 2
    torch.testing.assert_close(from_expectation(MultiLabel(), logits, 2), expected)


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_expectation_of_regression(outputs):
    """Guards the Gaussian's variance: by quadrature, exact for a squared gradient."""
    logits = normal(seeded(0), 4, outputs).requires_grad_()
    deviation = (outputs / 2) ** 0.5
    expected = torch.zeros_like(logits)
    for c in range(outputs):
        for sign in (-1, 1):
            y = logits.detach().clone()
            y[:, c] += sign * deviation
            expected += gradients(Regression().losses(logits, y), logits) ** 2 / 2
    torch.testing.assert_close(from_expectation(Regression(), logits, 2), expected)


@pytest.mark.parametrize("kind", [Regression(), MultiLabel()])
def test_no_expectation_of_absolute_gradients(kind):
    """Guards against the squared form where the absolute gradient is asked for."""
    assert kind.expectation(torch.zeros(2, 3), 1) is None
    tokens: Any = Tokens(shifted=True)
    assert tokens.expectation(torch.zeros(2, 3, 4), 2) is None


N = 4000


def assert_distribution(drawn, p):
    """Counts within five standard deviations of what p says."""
    counts = torch.stack([(drawn == c).sum(0) for c in range(len(p))]).double()
    assert ((counts - N * p).abs() <= 5 * (N * p * (1 - p)).sqrt() + 1e-9).all(), counts / N


def test_single_label_draws_from_the_model():
    """Guards the distribution, and that a class of probability 0 is never drawn."""
    logits = torch.tensor([[0.5, -1.0, 1.5, -torch.inf, 0.0]])
    drawn = SingleLabel().draw(logits.expand(N, -1), torch.zeros(N), generators(N))
    assert_distribution(drawn, logits[0].double().softmax(-1))


def test_multi_label_draws_from_the_model():
    """Guards the distribution of each label and their independence."""
    logits = torch.tensor([0.5, -2.0, 0.0])
    drawn = MultiLabel().draw(logits.expand(N, -1), torch.zeros(N, 3), generators(N))
    p = logits.double().sigmoid()
    for c in range(3):
        assert_distribution(drawn[:, c], torch.stack([1 - p[c], p[c]]))
    both = (drawn[:, 0] * drawn[:, 2]).mean().double()
    assert abs(both - p[0] * p[2]) < 5 * (0.25 / N) ** 0.5


@pytest.mark.parametrize("outputs", [1, 2, 8])
def test_regression_draws_from_its_gaussian(outputs):
    """Guards mean and variance C / 2, which make the squared error a log-likelihood."""
    mean = torch.arange(outputs).float()
    drawn = Regression().draw(mean.expand(N, -1), torch.zeros(N, outputs), generators(N))
    variance = outputs / 2
    assert ((drawn.mean(0) - mean).abs() < 5 * (variance / N) ** 0.5).all()
    assert ((drawn.var(0) / variance - 1).abs() < 5 * (2 / N) ** 0.5).all()


@quick
@given(SHAPES, st.booleans(), st.integers(0, 2))
def test_tokens_are_drawn_where_labelled(shape, shifted, virtual):
    """Guards against labels for padding or for the prompt; probability 0 is never drawn."""
    b, t, classes, seed = shape
    g = seeded(seed)
    logits = normal(g, b, t + virtual, classes + 1)
    logits[..., -1] = -torch.inf
    labels = some_ignored(torch.randint(0, classes, (b, t), generator=g), g)
    before = labels.clone()
    drawn = Tokens(shifted).draw(logits, labels, generators(b))
    assert torch.equal(labels, before)
    assert drawn.shape == labels.shape
    read = slice(1, None) if shifted and not virtual else slice(None)
    labelled = labels[:, read] != IGNORED
    assert torch.equal(drawn[:, read] != IGNORED, labelled)
    assert (drawn[:, read][labelled] < classes).all()


@pytest.mark.parametrize("shifted", [False, True])
def test_tokens_are_drawn_from_their_own_position(shifted):
    """Guards against drawing by the logits of another position."""
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.4, 0.3], [0.0, 0.5, 0.5]])
    logits = p.log().expand(N, -1, -1)
    drawn = Tokens(shifted).draw(logits, torch.zeros(N, 4).long(), generators(N))
    for position in range(shifted, 4):
        assert_distribution(drawn[:, position], p[position - shifted].double())


def test_draws_do_not_depend_on_the_batch():
    """Guards against a stream shared by the examples, or moved by padding."""
    g = seeded(0)
    logits = normal(g, 4, 6, 50)
    labels = some_ignored(torch.randint(0, 50, (4, 6), generator=g), g)
    kind = Tokens(shifted=True)
    together = kind.draw(logits, labels, generators(4))
    for i in range(4):
        alone = kind.draw(logits[i : i + 1], labels[i : i + 1], [generator_of(0, i, 0)])
        assert torch.equal(alone[0, 1:], together[i, 1:])
    padded = kind.draw(
        F.pad(logits, (0, 0, 0, 3)), F.pad(labels, (0, 3), value=IGNORED), generators(4)
    )
    assert torch.equal(padded[:, 1:6], together[:, 1:])


def test_streams_differ():
    """Guards against one stream for all seeds, examples or draws, and against a weak hash that
    lets (seed 1, example 12) meet (seed 11, example 2)."""
    keys = [(s, e, d) for s in range(12) for e in range(25) for d in range(3)]
    streams = {tuple(torch.rand(4, generator=generator_of(*key)).tolist()) for key in keys}
    assert len(streams) == len(keys)
    assert torch.equal(
        torch.rand(4, generator=generator_of(1, 2, 3)),
        torch.rand(4, generator=generator_of(1, 2, 3)),
    )


@pytest.mark.parametrize(
    ("logits", "labels", "expected"),
    [
        ((4, 3), torch.zeros(4).long(), [SingleLabel()]),
        ((4, 1), torch.zeros(4).long(), [Regression()]),
        ((4, 1), torch.zeros(4), [Regression()]),
        ((4, 2), torch.zeros(4, 2), [MultiLabel(), Regression()]),
        ((4, 2), torch.zeros(4, 2).long(), [Regression()]),
        ((4, 6, 3), torch.zeros(4, 6).long(), [Tokens(False), Tokens(True)]),
        ((4, 6, 3), torch.zeros(4, 5).long(), [Tokens(False), Tokens(True)]),
        ((4, 6, 3), torch.zeros(4, 7).long(), []),
        ((4, 6, 3), torch.zeros(3, 6).long(), []),
        ((4, 3), torch.zeros(4), []),
        ((4, 3), torch.zeros(3).long(), []),
        ((4,), torch.zeros(4), []),
    ],
)
def test_what_fits(logits, labels, expected):
    """Guards the reading of shapes and types, and its order."""
    assert [k for k in LIKELIHOODS if k.fits(torch.zeros(logits), labels)] == expected
