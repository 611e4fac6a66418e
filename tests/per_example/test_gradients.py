"""One backward pass for a batch: every rule, and everything that has none, against autograd."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from fish_tuning import apply_mask, calculate_fisher_information
from fish_tuning.per_example import accumulate
from fish_tuning.per_example.errors import OnePassError
from fish_tuning.per_example.gradients import PerExampleGradients
from fish_tuning.per_example.sums import GradientSums

B, T, D, V = 6, 5, 8, 13


def squared_error(outputs, batch):
    return (outputs - batch[1]).flatten(1).square().sum(1)


def naive(model, inputs, targets, power=2):
    """Each example alone through the model and its own .backward()."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for x, y in zip(inputs, targets, strict=True):
        model.zero_grad()
        squared_error(model(x[None]), (x, y[None])).sum().backward()
        for name in sums:
            gradient = parameters[name].grad
            if gradient is not None:
                sums[name] += gradient.abs() ** power
    model.zero_grad(set_to_none=True)
    return {name: total / len(inputs) for name, total in sums.items()}


def scored(model, inputs, targets, size=4, statistic="squared"):
    loader = zip(inputs.split(size), targets.split(size), strict=True)
    return calculate_fisher_information(
        model, loader, loss_fn=squared_error, statistic=statistic, progress=False
    )


def assert_naive(model, inputs, targets, rtol=1e-9, **options):
    power = 1 if options.get("statistic") == "absolute" else 2
    expected = naive(model, inputs, targets, power)
    scores = scored(model, inputs, targets, **options)
    assert scores.keys() == expected.keys()
    for name, score in scores.items():
        scale = float(expected[name].max())
        assert scale > 0, name
        torch.testing.assert_close(score, expected[name], rtol=rtol, atol=rtol * scale, msg=name)


def one_at_a_time(caplog):
    return [r.getMessage() for r in caplog.records if "one example at a time" in r.getMessage()]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def floats():
    return torch.randn(B, T, D, dtype=torch.float64), torch.randn(B, T, D, dtype=torch.float64)


@pytest.fixture
def indices():
    return torch.randint(0, V, (B, T)), torch.randn(B, T, D, dtype=torch.float64)


def norm(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


LAYERS = {
    "Linear": lambda: nn.Linear(D, D),
    "Linear without bias": lambda: nn.Linear(D, D, bias=False),
    "Conv1D": lambda: Conv1D(D, D),
    "LayerNorm": lambda: norm(nn.LayerNorm(D, eps=1e-3)),
    "nn.RMSNorm": lambda: norm(nn.RMSNorm(D)),
    "LlamaRMSNorm": lambda: norm(LlamaRMSNorm(D, eps=1e-2)),
    "GemmaRMSNorm": lambda: norm(GemmaRMSNorm(D, eps=1e-2)),
    "T5LayerNorm": lambda: norm(T5LayerNorm(D, eps=1e-2)),
}


@pytest.mark.parametrize("statistic", ["squared", "absolute"])
@pytest.mark.parametrize("layer", LAYERS)
def test_rule_equals_one_example_at_a_time(layer, statistic, floats, caplog):
    """Guards each rule: a wrong axis, a missing eps or a norm rounded otherwise than the module
    does (transformers' RMSNorms compute in float32 inside float64 models)."""
    model = nn.Sequential(nn.Linear(D, D), LAYERS[layer](), nn.Tanh(), nn.Linear(D, D)).double()
    # Gemma's norm multiplies by its weight in float32, and so does its gradient.
    rtol = 1e-6 if layer == "GemmaRMSNorm" else 1e-9
    assert_naive(model, *floats, rtol=rtol, statistic=statistic)
    assert not one_at_a_time(caplog)


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_embedding_rule_adds_up_repeated_tokens(padding_idx, indices, caplog):
    """Guards against squaring each occurrence of a token instead of their sum, against mixing
    examples that share a token, and against a gradient at padding_idx, which has none."""
    inputs, targets = indices
    inputs[:, :2] = 3
    inputs[:, 2:4] = inputs[:1, 4:]
    model = nn.Sequential(nn.Embedding(V, D, padding_idx), nn.Tanh(), nn.Linear(D, D)).double()
    assert_naive(model, inputs, targets)
    assert bool(scored(model, inputs, targets)["0.weight"][3].any()) == (padding_idx is None)
    assert not one_at_a_time(caplog)


def test_inputs_without_a_token_axis(caplog):
    """Guards against reading (b, d) as one example of b tokens."""
    model = nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, 2)).double()
    inputs = torch.randn(B, D, dtype=torch.float64)
    assert_naive(model, inputs, torch.randn(B, 2, dtype=torch.float64))
    assert not one_at_a_time(caplog)


def test_inputs_with_two_token_axes(caplog):
    """Guards against folding only one of several position axes."""
    model = nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D)).double()
    inputs = torch.randn(B, 2, 3, D, dtype=torch.float64)
    assert_naive(model, inputs, torch.randn_like(inputs))
    assert not one_at_a_time(caplog)


def test_wide_layers_in_chunks(floats, monkeypatch, caplog):
    """Guards against losing or repeating examples where a layer is scored a few at a time."""
    monkeypatch.setattr(accumulate, "CHUNK_ENTRIES", 2 * D * D + 1)
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)).double()
    assert_naive(model, *floats, size=5)
    assert not one_at_a_time(caplog)


class Twice(nn.Module):
    """Weight sharing: one module called twice in a forward, on x and on its own output."""

    def __init__(self):
        super().__init__()
        self.first, self.shared = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        return self.shared(torch.tanh(self.shared(x)))


class TwoNames(nn.Module):
    """Weight sharing: one parameter of two modules of different kinds."""

    def __init__(self):
        super().__init__()
        self.embed, self.middle, self.head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.middle(self.embed(x))))


def test_module_called_twice(floats, caplog):
    """Guards against squaring the gradients of two calls before adding them."""
    assert_naive(Twice().double(), *floats)
    assert not one_at_a_time(caplog)


def test_tied_embedding_and_head(caplog):
    """Guards against scoring only one use of a tied weight, or the sum of both uses' squares."""
    inputs = torch.randint(0, V, (B, T))
    assert_naive(TwoNames().double(), inputs, torch.randn(B, T, V, dtype=torch.float64))
    assert not one_at_a_time(caplog)


class Overwritten(nn.Module):
    """Writes into the output of its embedding, as CTRL does."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(V, D), nn.Linear(D, D)

    def forward(self, ids):
        hidden = self.embedding(ids)
        hidden *= 3
        return self.head(torch.tanh(hidden))


def test_outputs_that_are_overwritten(indices, caplog):
    """Guards batches after the first, where backward ends at the outputs nearest to the input."""
    assert_naive(Overwritten().double(), *indices, size=2)
    assert not one_at_a_time(caplog)


class BehindItsBack(nn.Module):
    """Uses a module's weight without calling the module (and once with)."""

    def __init__(self, calls_too):
        super().__init__()
        self.first, self.lin, self.calls_too = nn.Linear(D, D), nn.Linear(D, D), calls_too

    def forward(self, x):
        x = torch.tanh(self.first(x))
        if self.calls_too:
            x = torch.tanh(self.lin(x))
        return F.linear(x, self.lin.weight) + self.lin.bias


@pytest.mark.parametrize("calls_too", [False, True])
def test_weight_used_behind_its_modules_back(calls_too, floats, caplog):
    """Guards against a silent 0, or half of a score, where hooks do not see a weight's use."""
    assert_naive(BehindItsBack(calls_too).double(), *floats)
    (message,) = one_at_a_time(caplog)
    assert "lin." in message


class EmbeddingBehindItsBack(nn.Module):
    """Looks tokens up, and once more reads a row without the module."""

    def __init__(self, vocabulary):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 3)

    def forward(self, x):
        return self.embed(x) + 0.1 * self.embed.weight[-1]


def test_large_token_ids_do_not_widen_the_check(caplog):
    """Guards against taking token ids for the size of an input: at 10^5 the check of the first
    batch would let a missed use of an embedding pass."""
    inputs = torch.randint(10**5 - 1000, 10**5, (B, T))
    assert_naive(EmbeddingBehindItsBack(10**5), inputs, torch.randn(B, T, 3), rtol=1e-4)
    assert one_at_a_time(caplog)


class SharedPositions(nn.Module):
    """Positions as BERT and GPT-2 have them: looked up once, (1, t), for all examples."""

    def __init__(self):
        super().__init__()
        self.positions, self.lin = nn.Embedding(T, D), nn.Linear(D, D)

    def forward(self, x):
        return self.lin(x + self.positions(torch.arange(x.shape[1])[None]))


@pytest.mark.parametrize("sizes", [[6], [1, 1, 4], [2, 4], [1] * 6])
def test_positions_shared_by_the_batch(sizes, floats, caplog):
    """Guards against squaring the sum over the examples: with one row for the batch, the check of
    the sum against autograd passes."""
    model = SharedPositions().double()
    inputs, targets = floats
    loader = zip(inputs.split(sizes), targets.split(sizes), strict=True)
    scores = calculate_fisher_information(model, loader, loss_fn=squared_error, progress=False)
    expected = naive(model, inputs, targets)
    for name, score in scores.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-9, atol=0)
    assert not one_at_a_time(caplog)


class OtherPositions(SharedPositions):
    """Positions for all examples, as few models take them."""

    def __init__(self, take):
        super().__init__()
        self.take = take

    def forward(self, x):
        return self.lin(x + self.take(self.positions(torch.arange(x.shape[1])[None])))


@pytest.mark.parametrize(
    "take",
    [
        lambda rows: rows[0],
        lambda rows: rows[-1],
        lambda rows: rows.mean(0),
        lambda rows: rows.repeat(2, 1, 1)[:1],
        lambda rows: rows.view(T, D),
    ],
    ids=["first", "last", "mean", "repeated", "one-only"],
)
@pytest.mark.parametrize("sizes", [[6], [1, 5]])
def test_rows_that_are_not_each_examples_own(take, sizes, floats, caplog):
    """Guards against giving an example the gradient of all of them, where the model reads one row
    of those that were made for each: their sum is right. And against an error of a model that
    does not take more rows than one."""
    model = OtherPositions(take).double()
    inputs, targets = floats
    loader = zip(inputs.split(sizes), targets.split(sizes), strict=True)
    scores = calculate_fisher_information(model, loader, loss_fn=squared_error, progress=False)
    expected = naive(model, inputs, targets)
    for name, score in scores.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-9, atol=0)
    (message,) = one_at_a_time(caplog)
    assert "positions.weight" in message


class TokensFirst(nn.Module):
    """Computes on (t, b, d)."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(D, D)

    def forward(self, x):
        return torch.tanh(self.lin(x.transpose(0, 1))).transpose(0, 1)


class Flat(nn.Module):
    """Computes on (b * t, d)."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(D, D)

    def forward(self, x):
        return torch.tanh(self.lin(x.flatten(0, 1))).view(x.shape)


@pytest.mark.parametrize("model_class", [TokensFirst, Flat])
@pytest.mark.parametrize("size", [1, T])
def test_first_axis_is_not_the_batch(model_class, size, floats, caplog):
    """Guards against taking tokens for examples, also where there are as many of both."""
    assert_naive(model_class().double(), *floats, size=size)
    assert "its first axis is not the batch" in one_at_a_time(caplog)[0]


class Doubled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


class GatedRMSNorm(nn.Module):
    """Borrows the name, takes two inputs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D))

    def forward(self, x, gate=None):
        return self.weight * F.rms_norm(x, (D,)) * x.sigmoid()


class CubedRMSNorm(nn.Module):
    """Borrows the name, computes something else."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(D) + 1)

    def forward(self, x):
        return self.weight**3 * F.rms_norm(x, (D,))


class Squared(torch.autograd.Function):
    """An operation that functorch does not take."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


class Old(nn.Linear):
    def forward(self, x):
        return Squared.apply(super().forward(x))


class Branching(nn.Linear):
    """Looks at numbers, which vmap does not have."""

    def forward(self, x):
        return super().forward(x) if x.isfinite().all() else x


class Shift(nn.Module):
    """Whose gradient is g itself."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(T, D))

    def forward(self, x):
        return x + self.shift


class Centred(nn.Linear):
    """Mixes the examples."""

    def forward(self, x):
        return super().forward(x - x.mean(0))


class WithLayer(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.first, self.layer = nn.Linear(D, D), layer

    def forward(self, x):
        y = self.layer(self.first(x))
        return y[0] if isinstance(y, tuple) else y


WITHOUT_CLOSED_FORM = {
    "subclass": lambda: Doubled(D, D),
    "cubed": CubedRMSNorm,
    "gated": GatedRMSNorm,
    "two axes": lambda: norm(nn.LayerNorm([T, D])),
    "shift": Shift,
    "Conv1d": lambda: nn.Conv1d(T, T, 3, padding=1),
    "old function": lambda: Old(D, D),
    "branching": lambda: Branching(D, D),
    "two layers": lambda: nn.Sequential(Doubled(D, D), CubedRMSNorm()),
}


@pytest.mark.parametrize("statistic", ["squared", "absolute"])
@pytest.mark.parametrize("entries", [2**24, 2 * D * D + 1], ids=["whole", "in-chunks"])
@pytest.mark.parametrize("layer", WITHOUT_CLOSED_FORM)
def test_layers_without_a_closed_form(layer, entries, statistic, floats, monkeypatch, caplog):
    """Guards the recomputed layers: against a rule for a layer that only looks like one it knows,
    gradients that are views of what others read, and rows lost where vmap does not do."""
    monkeypatch.setattr(accumulate, "CHUNK_ENTRIES", entries)
    model = WithLayer(WITHOUT_CLOSED_FORM[layer]()).double()
    assert_naive(model, *floats, statistic=statistic)
    assert not one_at_a_time(caplog)


def test_convolution_in_two_dimensions(caplog):
    """Guards against folding channels and positions into one another."""
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, 2)).double()
    inputs = torch.randn(B, 2, 5, 5, dtype=torch.float64)
    assert_naive(model, inputs, torch.randn(B, 2, 3, 3, dtype=torch.float64))
    assert not one_at_a_time(caplog)


@pytest.mark.parametrize("layer", [lambda: nn.GRU(D, D, batch_first=True), lambda: Centred(D, D)])
def test_layers_that_cannot_be_recomputed(layer, floats, monkeypatch, caplog):
    """Guards against rows of a layer that has none, or gives more than one tensor."""
    model = WithLayer(layer()).double()
    inputs, targets = floats
    if isinstance(model.layer, nn.GRU):
        assert_naive(model, inputs, targets)
    else:
        scored(model, inputs, targets)  # An example alone is centred to 0: there is no reference.
    assert len(one_at_a_time(caplog)) == 1


class TiedHead(nn.Module):
    """A parameter of a closed form and of a recomputed layer at once."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(V, D), Doubled(D, V)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.embed(x)))


def test_a_parameter_of_both_kinds(caplog):
    """Guards against squaring the gradient of each use where one of them is recomputed."""
    inputs = torch.randint(0, V, (B, T))
    assert_naive(TiedHead().double(), inputs, torch.randn(B, T, V, dtype=torch.float64))
    assert not one_at_a_time(caplog)


@pytest.mark.parametrize("autocast", [False, True], ids=["cast", "autocast"])
def test_recomputed_in_half_precision(autocast, floats, caplog):
    """Guards against running a layer again in another precision than the model ran it in."""
    model = WithLayer(nn.Sequential(Doubled(D, D), Doubled(D, D)))
    inputs, targets = (values.float() for values in floats)
    expected = naive(model, inputs, targets)
    if not autocast:
        model, inputs, targets = model.bfloat16(), inputs.bfloat16(), targets.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores = scored(model, inputs, targets)
    for name, score in scores.items():
        assert (score - expected[name]).norm() < 0.05 * expected[name].norm(), name
    assert not one_at_a_time(caplog)


class Sometimes(nn.Module):
    """A branch that only some batches take, and a layer that none takes."""

    def __init__(self):
        super().__init__()
        self.lin, self.rare, self.never = (nn.Linear(D, D) for _ in range(3))

    def forward(self, x):
        x = torch.tanh(self.lin(x))
        return self.rare(x) if x.sum() > 0 else x


def test_unused_parameters_score_zero(floats, caplog):
    """Guards against a score that is missing or left from another batch where a layer is not
    used; the report names what never was."""
    model = Sometimes().double()
    expected = naive(model, *floats)
    for name, score in scored(model, *floats, size=1).items():
        torch.testing.assert_close(score, expected[name], rtol=1e-9, atol=0)
    assert "never.weight, never.bias" in caplog.text


def test_part_of_the_outputs_used(floats):
    """Guards against losing a layer one of whose calls the loss does not depend on."""

    class Half(Twice):
        def forward(self, x):
            self.shared(2 * x)
            return super().forward(x)

    assert_naive(Half().double(), *floats)


def watched(model):
    sums = GradientSums(dict(model.named_parameters()), power=2)
    return PerExampleGradients(model, sums), sums


def test_sums_only_what_is_watched(floats):
    """Guards the interface: two batches add up, a call outside leaves no hook and no trace."""
    inputs, targets = floats
    model = nn.Linear(D, D).double()
    gradients, sums = watched(model)
    model(inputs).sum().backward()
    for x, y in zip(inputs.split(4), targets.split(4), strict=True):
        with gradients.watching(len(x)):
            gradients.backward(squared_error(model(x), (x, y)))
    assert not model._forward_hooks
    expected = naive(model, inputs, targets)
    for name, total in sums.totals.items():
        torch.testing.assert_close(total / B, expected[name], rtol=1e-9, atol=0)


def test_failed_check_leaves_no_sums(floats):
    """Guards against counting the first batch twice after its check failed."""
    inputs, targets = floats
    model = BehindItsBack(True).double()
    gradients, sums = watched(model)
    with (
        pytest.raises(OnePassError, match=r"the gradient of lin\.\w+ is not the one"),
        gradients.watching(B),
    ):
        gradients.backward(squared_error(model(inputs), (inputs, targets)))
    assert not any(total.any() for total in sums.totals.values())


def test_another_number_of_rows_is_refused_before_backward(floats):
    """Guards against scores of rows that are no examples, in any batch after the first too."""
    model = nn.Linear(D, D).double()
    gradients, _ = watched(model)
    with pytest.raises(OnePassError, match=r"\(2, 5, 8\) for 6 examples"), gradients.watching(B):
        model(floats[0][:2])
    assert not model._forward_hooks


def test_frozen_parameters_are_neither_scored_nor_a_hindrance(floats, caplog):
    """Guards against a fallback, or a score, for what is not trainable."""
    caplog.set_level(logging.WARNING)
    model = nn.Sequential(nn.Linear(D, D), Doubled(D, D), nn.Linear(D, D)).double()
    model[1].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    assert_naive(model, *floats)
    assert not caplog.records


def test_values_of_a_mask(floats, caplog):
    """Guards against the gradient of a whole tensor where some entries of it are trained."""
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D)).double()
    half = {name: torch.arange(p.numel()).view(p.shape) % 2 for name, p in model.named_parameters()}
    apply_mask(model, half)
    assert_naive(model, *floats)
    assert "0.weight is trained in part" in one_at_a_time(caplog)[0]


class InputNeedsGrad(nn.Module):
    """Makes its hidden states a leaf that requires a gradient, as transformers models do after
    `enable_input_require_grads()`."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x.requires_grad_())))


@pytest.mark.parametrize("size", [2, 6])
def test_other_leaves_than_parameters(size, floats, caplog):
    """Guards the shortcut of backward after the first batch: with no trainable layer nearest to
    the input there is nothing that it could stop at."""
    assert_naive(InputNeedsGrad().double(), *floats, size=size)
    assert not one_at_a_time(caplog)
