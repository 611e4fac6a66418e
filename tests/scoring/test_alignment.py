"""LoRA's A along the leading directions of Fisher information, against whole weight gradients."""

import pytest
import torch
from torch import nn

from fish_tuning import FishConfig, align_with_fisher, calculate_fisher_information, get_fish_model
from fish_tuning.scoring.alignment import _leading_eigenvectors
from tests.models import batches_of, examples_for, reference_loss, tiny_bert, tiny_gpt2, with_lora


def moments_of(model, examples):
    """mean_i G_i^T G_i of every adapted linear layer, from whole gradients of its base weight."""
    weights = {n: p for n, p in model.named_parameters() if n.endswith("base_layer.weight")}
    totals = {n: torch.zeros(p.shape[1], p.shape[1], dtype=p.dtype) for n, p in weights.items()}
    model.eval()
    for weight in weights.values():
        weight.requires_grad_(True)
    for example in examples:
        gradients = torch.autograd.grad(reference_loss(model, example), [*weights.values()])
        for name, gradient in zip(weights, gradients, strict=True):
            totals[name] += gradient.T @ gradient
    for weight in weights.values():
        weight.requires_grad_(False)
    return {n.removesuffix("base_layer.weight"): t / len(examples) for n, t in totals.items()}


def rows_of(model):
    return {
        n.removesuffix("lora_A.default.weight"): p.detach().clone()
        for n, p in model.named_parameters()
        if "lora_A" in n
    }


def setting(**changes):
    model = with_lora(tiny_bert().double(), r=3, **changes).double()
    examples = examples_for(model, 40)
    return model, examples, batches_of(examples, 8)


def test_b_gets_nearly_all_the_fisher_information_there_is():
    """Guards the claim: the sum of B's scores is near the largest that any A of that size gives."""
    model, examples, batches = setting(lora_alpha=6)
    moments, before = moments_of(model, examples), rows_of(model)
    align_with_fisher(model, batches, progress=False)
    after = rows_of(model)
    scores = calculate_fisher_information(model, batches, progress=False)
    for name, moment in moments.items():
        rows = after[name]
        length = before[name].norm(dim=1).mean()
        assert torch.allclose(rows @ rows.T, length**2 * torch.eye(3, dtype=rows.dtype), atol=1e-9)
        of_b = scores[name + "lora_B.default.weight"].sum()
        # The scale c is alpha / r = 2.
        assert torch.allclose(of_b, 4 * (rows @ moment @ rows.T).trace(), rtol=1e-6)
        best = 4 * length**2 * torch.linalg.eigvalsh(moment)[-3:].sum()
        drawn = 4 * (before[name] @ moment @ before[name].T).trace()
        assert 0.9 * best < of_b <= best * (1 + 1e-9)
        assert of_b > drawn


def test_more_examples_find_the_directions_themselves():
    """Guards the estimate: with a gradient of one direction, A's first row is that direction."""

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4, bias=False)

        def forward(self, x):
            return self.layer(x)

    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(One(), LoraConfig(r=2, target_modules=["layer"]))
    direction = torch.nn.functional.normalize(torch.randn(6), dim=0)
    batch = {"x": torch.randn(16, 1) * direction, "labels": torch.randint(4, (16,))}
    align_with_fisher(model, [batch], progress=False)
    row = rows_of(model)["base_model.model.layer."][0]
    assert abs(float(torch.cosine_similarity(row, direction, dim=0))) > 1 - 1e-5


def test_nothing_else_changes():
    """Guards what is borrowed: outputs, modes, gradients, random numbers, every other tensor."""
    model, _, batches = setting()
    model.train()
    state = {n: t.clone() for n, t in model.state_dict().items() if "lora_A" not in n}
    generator = torch.get_rng_state()
    align_with_fisher(model, batches, progress=False)
    assert model.training and torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert all(p.grad is None for p in model.parameters())
    again, _, _ = setting()
    align_with_fisher(again, batches, progress=False)
    assert all(torch.equal(rows_of(again)[name], rows) for name, rows in rows_of(model).items())


def test_a_wider_rank_than_the_layer_keeps_the_rows_beyond():
    """Guards r > d: there are only d orthogonal directions."""
    model = with_lora(tiny_bert(), r=20, target_modules=["query"])
    before = rows_of(model)
    align_with_fisher(model, batches_of(examples_for(model, 8), 4), progress=False)
    for name, rows in rows_of(model).items():
        wide = rows.shape[1]
        assert wide < 20
        assert torch.equal(rows[wide:], before[name][wide:])
        assert not torch.equal(rows[:wide], before[name][:wide])


def test_one_example_at_a_time_is_the_same():
    """Guards the slow path: a model whose loss is its own gives the same directions."""
    model, _, batches = setting()
    other, _, _ = setting()
    align_with_fisher(model, batches, progress=False)
    align_with_fisher(other, [b for batch in batches for b in one_by_one(batch)], progress=False)
    for name, rows in rows_of(model).items():
        assert torch.allclose(rows, rows_of(other)[name], atol=1e-6)


def one_by_one(batch):
    size = len(batch["labels"])
    return [{key: value[i : i + 1] for key, value in batch.items()} for i in range(size)]


def test_leading_eigenvectors():
    """Guards the decomposition against torch's whole one, signs and order included."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64))[0]
    matrix = basis @ torch.diag(0.5 ** torch.arange(30, dtype=torch.float64)) @ basis.T
    found = _leading_eigenvectors(matrix, 4, seed=0)
    expected = torch.linalg.eigh(matrix)[1].flip(1)[:, :4].T
    assert torch.allclose((found * expected).sum(1).abs(), torch.ones(4, dtype=torch.float64))
    assert (found.gather(1, found.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize(
    "changes", [{"init_lora_weights": False}, {"target_modules": ["word_embeddings"]}]
)
def test_what_cannot_be_aligned_is_refused(changes):
    """Guards an adapter that has a start of its own, and one without a linear layer."""
    model = with_lora(tiny_bert(), **changes)
    with pytest.raises(ValueError, match="nothing to align"):
        align_with_fisher(model, batches_of(examples_for(model, 4), 4), progress=False)


@pytest.mark.parametrize(
    "option", [{"estimator": "exact"}, {"token_reduction": "max"}, {"num_samples": 0}]
)
def test_options_are_those_of_scoring(option):
    """Guards against an option that is misspelt and then means something else."""
    model = with_lora(tiny_bert())
    before = rows_of(model)
    (name, value), *_ = option.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}: "):
        align_with_fisher(model, batches_of(examples_for(model, 4), 4), **option)
    assert all(torch.equal(rows, before[n]) for n, rows in rows_of(model).items())


def test_std_has_to_be_positive():
    """Guards against a perturbation that hides A again."""
    model = with_lora(tiny_gpt2())
    with pytest.raises(ValueError, match="std=0: above 0"):
        align_with_fisher(model, batches_of(examples_for(model, 4), 4), std=0)


@pytest.mark.parametrize("criterion", ["fisher", "random", "magnitude", "reversed"])
def test_get_fish_model_aligns_first(criterion):
    """Guards the config: every criterion selects from the same aligned start."""
    model, _, batches = setting()
    expected, _, _ = setting()
    align_with_fisher(expected, batches, progress=False)
    config = FishConfig(keep_ratio=0.2, start="fisher", scope="rank", criterion=criterion)
    get_fish_model(model, config, iter(batches), progress=False)
    for name, rows in rows_of(expected).items():
        assert torch.equal(model.state_dict()[name + "lora_A.default.weight"], rows)


def test_a_failure_puts_a_back():
    """Guards the model: what fails after the alignment leaves no trace of it."""
    model, _, batches = setting()
    before = rows_of(model)
    calls = []

    def loss_fn(outputs, batch):
        calls.append(1)
        if len(calls) > 8:
            raise RuntimeError("stop")
        return nn.functional.cross_entropy(outputs.logits, batch["labels"], reduction="none")

    config = FishConfig(keep_ratio=0.2, start="fisher")
    with pytest.raises(RuntimeError, match="stop"):
        get_fish_model(model, config, batches, loss_fn=loss_fn, progress=False)
    assert all(torch.equal(rows, before[name]) for name, rows in rows_of(model).items())
    model, _, _ = setting()
    with pytest.raises(ValueError, match="start='fisher' needs a calibration_dataloader"):
        get_fish_model(model, FishConfig(keep_ratio=0.2, start="fisher", criterion="random"))
