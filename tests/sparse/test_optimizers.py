"""Optimizers that compute with whole matrices are refused, and others are not."""

import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_riemannian_optimizer

from fish_tuning import apply_mask, remove_mask
from tests.sparse.small import inputs, lora_mlp, random_mask


def lora_fa(model):
    return create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.1)


def riemannian(model):
    return create_riemannian_optimizer(model, torch.optim.SGD, lr=0.1)


def muon(model):
    return torch.optim.Muon([p for p in model.parameters() if p.requires_grad], 0.1)


BY_MATRIX = [lora_fa, riemannian, muon]


def all_of(model):
    return {name: torch.ones_like(bits) for name, bits in random_mask(model).items()}


def one_of(model):
    """A single entry of each tensor: its values multiply like any matrix."""
    mask = {name: torch.zeros_like(bits) for name, bits in random_mask(model).items()}
    for bits in mask.values():
        bits.view(-1)[0] = True
    return mask


def b_alone(model):
    mask = all_of(model)
    return {n: bits if "lora_B" in n else torch.zeros_like(bits) for n, bits in mask.items()}


def step(model, optimizer):
    model(inputs()).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("mask", [random_mask, one_of, b_alone], ids=lambda f: f.__name__)
@pytest.mark.parametrize("build", BY_MATRIX, ids=lambda f: f.__name__)
def test_optimizers_of_matrices_are_refused(build, mask):
    """Guards against errors about shapes, and against wrong steps where the shapes fit."""
    model = lora_mlp()
    apply_mask(model, mask(model))
    if build is riemannian and mask is b_alone:
        with pytest.raises(ValueError, match="did not find any trainable lora_A/lora_B"):
            build(model)
        return
    optimizer = build(model)
    with pytest.raises(ValueError, match="treats each number by itself, such as AdamW, or call"):
        step(model, optimizer)


@pytest.mark.parametrize("build", BY_MATRIX, ids=lambda f: f.__name__)
def test_optimizers_of_matrices_train_whole_tensors(build):
    """Guards against refusing what works: masks of whole tensors, and unmasked models."""
    model, plain, other = lora_mlp(), lora_mlp(), lora_mlp()
    apply_mask(model, all_of(model))
    apply_mask(other, random_mask(other))
    for each in (model, plain):
        step(each, build(each))
    torch.testing.assert_close(model.state_dict(), plain.state_dict())


@pytest.mark.parametrize("build", BY_MATRIX, ids=lambda f: f.__name__)
def test_optimizers_of_matrices_train_after_the_mask(build):
    """Guards against a refusal that outlives the mask."""
    model, plain = lora_mlp(), lora_mlp()
    apply_mask(model, random_mask(model))
    remove_mask(model)
    for each in (model, plain):
        step(each, build(each))
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
