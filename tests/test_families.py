"""Kinds of models: each is scored as a loop over examples and trained as a dense model is."""

import copy

import pytest
import torch
from torch import nn

from fish_tuning import (
    apply_mask,
    calculate_fisher_information,
    create_mask_from_fisher,
    remove_mask,
)
from tests.models import (
    assert_scores_close,
    batches_of,
    examples_for,
    naive_scores,
    reference_loss,
    tiny_bart,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_roberta,
    tiny_t5,
    tiny_vit,
    with_lora,
)

BUILDS = [tiny_bert, tiny_roberta, tiny_llama, tiny_gpt2, tiny_t5, tiny_bart, tiny_vit]
NO_DROPOUT = (
    "attention_dropout",
    "activation_dropout",
    "classifier_dropout",
    "dropout",
    "dropout_prob",  # of BERT before transformers 5
)


class Regressor(nn.Module):
    """A plain module that computes no loss and takes its input by position."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def huber(outputs, targets):
    """A loss that no model of transformers has; (b,) of outputs and targets (b, 2)."""
    return nn.functional.smooth_l1_loss(outputs, targets, reduction="none").sum(1)


def adapted(build, dtype=torch.float64):
    model = with_lora(build(), init_lora_weights=False, lora_dropout=0.0).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in NO_DROPOUT:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def as_type(examples, dtype):
    return [
        {key: v.to(dtype) if v.is_floating_point() else v for key, v in example.items()}
        for example in examples
    ]


@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("size", [1, 4])
def test_scores_equal_the_loop(build, size, caplog):
    """Guards a family whose forward pass mixes examples, or hides the batch axis."""
    model = adapted(build)
    examples = as_type(examples_for(model, 6), torch.float64)
    scores = calculate_fisher_information(model, batches_of(examples, size), progress=False)
    assert_scores_close(scores, naive_scores(model, examples))
    assert "one example at a time" not in caplog.text


def test_all_weights_of_an_image_model(caplog):
    """Guards convolution, class token and positions, which have no closed form."""
    model = tiny_vit().double()
    examples = as_type(examples_for(model, 5), torch.float64)
    scores = calculate_fisher_information(model, batches_of(examples, 3), progress=False)
    assert_scores_close(scores, naive_scores(model, examples), rtol=1e-8)
    assert "one example at a time" not in caplog.text


def train(model, batches, loss, bits=None):
    """Three epochs of AdamW; with `bits`, of a dense model whose gradients are masked."""
    if bits is not None:
        for name, p in trainable(model).items():
            p.register_hook(lambda gradient, own=bits[name]: gradient * own)
    optimizer = torch.optim.AdamW(trainable(model).values(), 0.01, weight_decay=0)
    model.train()
    for _ in range(3):
        for batch in batches:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()


def assert_trains_as_dense(model, mask, batches, loss):
    twin, before = copy.deepcopy(model), copy.deepcopy(dict(model.named_parameters()))
    apply_mask(model, mask)
    assert sum(p.numel() for p in trainable(model).values()) == mask.num_trainable
    train(model, batches, loss)
    train(twin, batches, loss, mask)
    remove_mask(model)
    now, dense = dict(model.named_parameters()), dict(twin.named_parameters())
    changed = 0
    for name, bits in mask.items():
        assert torch.equal(now[name][~bits], before[name][~bits]), name
        changed += int((now[name] != before[name]).sum())
        torch.testing.assert_close(now[name], dense[name], rtol=1e-9, atol=1e-9, msg=name)
    assert changed > 0.9 * mask.num_trainable


@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)
def test_plain_loop_trains_as_a_dense_model(build):
    """Guards a family that reads a tensor in a way that the masked one does not survive."""
    model = adapted(build)
    batches = batches_of(as_type(examples_for(model, 8), torch.float64), 4)
    scores = calculate_fisher_information(model, batches, progress=False)
    mask = create_mask_from_fisher(scores, 0.3, names_to_exclude=["modules_to_save"])
    assert_trains_as_dense(model, mask, batches, lambda model, batch: model(**batch).loss)


def test_plain_module_with_a_loss_of_its_own():
    """Guards models that transformers does not know: loss_fn, and a custom training loop."""
    model = Regressor().double()
    x, y = torch.randn(10, 6).double(), torch.randn(10, 2).double()
    batches = [{"x": x[i : i + 4], "labels": y[i : i + 4]} for i in range(0, 10, 4)]
    scores = calculate_fisher_information(
        model, batches, loss_fn=lambda outputs, batch: huber(outputs, batch["labels"])
    )
    singles = [{"x": x[i : i + 1], "labels": y[i : i + 1]} for i in range(10)]
    loss = lambda model, batch: huber(model(batch["x"]), batch["labels"]).sum()  # noqa: E731
    assert_scores_close(scores, naive_scores(model, singles, loss=loss))
    mask = create_mask_from_fisher(scores, 0.3)
    assert_trains_as_dense(model, mask, batches, loss)


@pytest.mark.parametrize("build", [tiny_vit, tiny_bart], ids=lambda build: build.__name__)
def test_loss_fn_equals_the_models_own(build):
    """Guards against losses of outputs that are read from other examples of the batch."""
    model = adapted(build)
    examples = as_type(examples_for(model, 6), torch.float64)

    def loss_fn(outputs, batch):
        losses = nn.functional.cross_entropy(
            outputs.logits.movedim(-1, 1), batch["labels"], reduction="none"
        ).reshape(len(batch["labels"]), -1)
        labelled = (batch["labels"] != -100).reshape(losses.shape)
        return losses.sum(1) / labelled.sum(1)

    batches = batches_of(examples, 3)
    scores = calculate_fisher_information(model, batches, loss_fn=loss_fn, progress=False)
    assert_scores_close(scores, naive_scores(model, examples, loss=reference_loss))
