"""Whose code computes a model's loss."""

import functools
from unittest.mock import Mock

import pytest
import torch
import transformers as tr
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from fish_tuning import calculate_fisher_information
from fish_tuning.scoring.inputs.forward import Forward
from fish_tuning.scoring.inputs.origin import is_of_transformers
from fish_tuning.scoring.losses import whole_batches
from tests.models import (
    base_of,
    batches_of,
    examples_for,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    with_lora,
)


def is_own(model):
    return is_of_transformers(model, Forward(model).base)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_t5, tiny_bert])
def test_models_of_transformers(build):
    """Guards the speed of language models, with and without an adapter, and once prepared."""
    assert is_own(build())
    model = with_lora(build())
    assert is_own(model)
    AcceleratorState._reset_state(reset_partial_state=True)  # Of a Trainer in an earlier test.
    assert is_own(Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model))
    AcceleratorState._reset_state(reset_partial_state=True)


class Subclass(tr.LlamaForCausalLM):
    """A class of the caller's own."""


class Wrapper(nn.Module):
    """A module of the caller's own around a model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **arguments):
        return self.model(**arguments)


def with_forward(model):
    original = model.forward

    @functools.wraps(original)
    def forward(*args, **kwargs):
        return original(*args, **kwargs)

    model.forward = forward
    return model


def with_loss(model, loss):
    model.loss_function = loss
    return model


def with_hook(model):
    model.register_forward_hook(lambda module, args, outputs: outputs)
    return model


OTHERS = {
    "subclass": lambda: Subclass(tiny_llama().config),
    "wrapper": lambda: Wrapper(tiny_llama()),
    "forward": lambda: with_forward(tiny_llama()),
    "loss function": lambda: with_loss(tiny_llama(), lambda **_: torch.zeros(())),
    "part of a loss": lambda: with_loss(tiny_llama(), functools.partial(ForCausalLMLoss, a=1)),
    "hook": lambda: with_hook(tiny_llama()),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_the_caller_may_have_changed(kind):
    """Guards a loss that is not transformers' own, in a model that looks as if it were."""
    model = OTHERS[kind]()
    assert not is_own(model)
    if kind != "wrapper":
        assert not is_own(with_lora(model))


@pytest.mark.parametrize("own", [True, False])
def test_how_often_the_loss_is_compared(own, monkeypatch):
    """Guards the time of language models: one comparison where transformers computes the loss."""
    comparing = Mock(wraps=whole_batches.explains)
    monkeypatch.setattr(whole_batches, "explains", comparing)
    model = with_lora(tiny_llama(), init_lora_weights=False)
    if not own:
        with_hook(base_of(model))
    loader = batches_of(examples_for(model, 8), 2)
    calculate_fisher_information(model, loader, progress=False)
    assert comparing.call_count == (1 if own else 4)
