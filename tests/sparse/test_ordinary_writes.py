"""Masked tensors, written and read by somebody who knows nothing of masks."""

import pytest
import torch
from peft import set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import nn

from tests.sparse.readings import READERS, assert_reads_the_same
from tests.sparse.twins import (
    CONFIGS,
    OWN,
    Twins,
    dense_model,
    inputs,
    tensor_of,
)

IDS = inputs()


def random_like(tensor, seed):
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)).to(tensor)


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


def train(twins, steps=2):
    for i in range(steps):
        twins.backward(i)
        twins.step(sgd)


# Writers: the same call on the masked model and on its dense twin


def each_tensor(write):
    def writer(model, names, folder):
        for seed, name in enumerate(names):
            write(tensor_of(model, name), seed)

    return writer


def assign_data(tensor, seed):
    tensor.data = random_like(tensor, seed)


def copy_(tensor, seed):
    with torch.no_grad():
        tensor.copy_(random_like(tensor, seed))


def write_some_rows(tensor, seed):
    with torch.no_grad():
        tensor[0] = 0.5


def load_own_state_dict(model, names, folder):
    state = model.state_dict()
    state |= {name: random_like(state[name], i) for i, name in enumerate(names)}
    model.load_state_dict(state)


WRITERS = {
    "copy_": each_tensor(copy_),
    "data.copy_": each_tensor(lambda tensor, seed: tensor.data.copy_(random_like(tensor, seed))),
    "data assigned": each_tensor(assign_data),
    "nn.init": each_tensor(lambda tensor, seed: nn.init.constant_(tensor, 0.3)),
    "some rows": each_tensor(write_some_rows),
    "one tensor": lambda model, names, folder: copy_(tensor_of(model, names[0]), 0),
    "load_state_dict": load_own_state_dict,
}


def other_adapter(kind, folder):
    other = dense_model(kind)
    for seed, (_, p) in enumerate(n for n in other.named_parameters() if n[1].requires_grad):
        p.data = random_like(p, 100 + seed)
    other.save_pretrained(folder)
    return folder


def reset_lora_parameters(model, names, folder):
    torch.manual_seed(3)
    for layer in ("lin0", "lin1"):
        model.get_submodule(f"base_model.model.{layer}").reset_lora_parameters("default", True)


def hot_swap(model, names, folder):
    hotswap_adapter(model, folder, adapter_name="default", torch_device="cpu")


def load_under_the_same_name(model, names, folder):
    model.load_adapter(folder, adapter_name="default", is_trainable=True)


def set_adapter_state(model, names, folder):
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))


OF_PEFT = {
    "reset_lora_parameters": reset_lora_parameters,
    "hotswap_adapter": hot_swap,
    "load_adapter": load_under_the_same_name,
    "set_peft_model_state_dict": set_adapter_state,
}


MAIN_READERS = ["forward, no gradients", "saved", "merge_and_unload"]
PAIRS = [
    (writer, reader)
    for writer in WRITERS | OF_PEFT
    for reader in READERS
    if reader in MAIN_READERS or writer in ("copy_", "data assigned", "hotswap_adapter")
]


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_what_was_written_is_read(writer, reader, tmp_path):
    """Guards against writes of which half is undone, and reads of what was there before."""
    twins = Twins.build("lora")
    train(twins)
    folder = other_adapter("lora", tmp_path / "other") if writer in OF_PEFT else None
    for model in twins.models():
        (WRITERS | OF_PEFT)[writer](model, list(twins.bits), folder)
    assert_reads_the_same(twins, reader, tmp_path)


@pytest.mark.parametrize("writer", WRITERS | OF_PEFT)
def test_training_goes_on_from_what_was_written(writer, tmp_path):
    """Guards against a step that starts from the numbers of before the write."""
    twins = Twins.build("lora")
    train(twins)
    folder = other_adapter("lora", tmp_path / "other") if writer in OF_PEFT else None
    for model in twins.models():
        (WRITERS | OF_PEFT)[writer](model, list(twins.bits), folder)
    train(twins)
    twins.assert_same_state()


@pytest.mark.parametrize("kind", [*CONFIGS, OWN])
@pytest.mark.parametrize("writer", WRITERS)
def test_every_kind_of_adapter_is_written(kind, writer):
    """Guards tensors that other modules than linear layers own, such as a ParameterDict."""
    twins = Twins.build(kind)
    train(twins)
    for model in twins.models():
        WRITERS[writer](model, twins.partly(), None)
    twins.assert_same_state()
    twins.assert_same_output(IDS)
    train(twins)
    twins.assert_same_state()
