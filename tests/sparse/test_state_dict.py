"""State dicts of masked models share the model's memory, and are saved whole."""

import copy
import re

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from fish_tuning import apply_mask
from tests.sparse.small import adapter_tensors, inputs, lora_mlp, random_mask, train


def masked(dtype=torch.float32):
    model = lora_mlp().to(dtype)
    return apply_mask(model, random_mask(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writing_a_state_dict_writes_the_model(dtype):
    """Guards against averages of weights that are written into a copy."""
    model = masked(dtype)
    average = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
        for mean, tensor in zip(
            average.state_dict().values(), model.state_dict().values(), strict=True
        ):
            mean.lerp_(tensor, 1)
    expected = lora_mlp().to(dtype)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.add_(1)
    x = inputs().to(dtype)
    assert torch.equal(model(x), expected(x))
    assert torch.equal(average(x), expected(x))


def test_a_state_dict_follows_training():
    model = masked()
    state = model.state_dict()
    before = copy.deepcopy(state)
    train(model)
    now = model.state_dict()
    assert all(torch.equal(tensor, now[name]) for name, tensor in state.items())
    assert any(not torch.equal(tensor, now[name]) for name, tensor in before.items())


def test_it_outlives_the_model():
    model = masked()
    expected = copy.deepcopy(model.state_dict())
    state = model.state_dict()
    del model
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


def test_each_tensor_is_saved_once(tmp_path):
    """Guards against files that lose tensors because they look tied, or hold one many times."""
    model = masked()
    train(model)
    expected = copy.deepcopy(model.state_dict())
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    Accelerator(cpu=True).save_model(model, tmp_path / "accelerate")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    torch.save(lora_mlp().state_dict(), tmp_path / "plain.pt")
    for found in (
        load_file(tmp_path / "model.safetensors"),
        load_file(tmp_path / "accelerate" / "model.safetensors"),
        torch.load(tmp_path / "model.pt", weights_only=True),
    ):
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    larger = (tmp_path / "model.pt").stat().st_size - (tmp_path / "plain.pt").stat().st_size
    # The checksums of the mask.
    assert larger < 2_000


def test_keep_vars_gives_what_the_modules_hold():
    """Guards against a filter by requires_grad that finds nothing trained."""
    model = masked()
    kept = model.state_dict(keep_vars=True)
    for name, tensor in adapter_tensors(model).items():
        path, _, attribute = name.rpartition(".")
        assert kept[name] is getattr(model.get_submodule(path), attribute)
        assert kept[name].requires_grad
        assert torch.equal(kept[name], tensor)


WARNING = "it may have been trained under another mask"


def test_a_file_of_another_mask(tmp_path, caplog):
    """Guards against a loop of one's own that goes on with other entries than were trained."""
    trained, same = masked(), masked()
    train(trained)
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    same.load_state_dict(saved)
    assert torch.equal(same(inputs()), trained(inputs()))
    assert WARNING not in caplog.text
    other = lora_mlp()
    apply_mask(other, random_mask(other, seed=1))
    other.load_state_dict(saved)
    assert re.search(r"changes \d+ of the \d+ entries of .*lora_", caplog.text)
    assert caplog.text.count(WARNING) == 1
    assert torch.equal(other(inputs()), trained(inputs()))


def dense_training(start):
    train(start)


def average(start):
    """Of two models that share the frozen entries, in an order of operations that rounds."""
    trained = apply_mask(copy.deepcopy(start), random_mask(start))
    train(trained)
    with torch.no_grad():
        for p, q in zip(start.state_dict().values(), trained.state_dict().values(), strict=True):
            p.copy_(0.3 * p + 0.7 * q)


def pruning(start):
    """Two of four ranks are set to zero."""
    with torch.no_grad():
        for name, p in start.named_parameters():
            if "lora_A" in name:
                p[2:] = 0
            elif "lora_B" in name:
                p[:, 2:] = 0


def pruning_of_entries(start):
    with torch.no_grad():
        for p in adapter_tensors(start).values():
            p[p.abs() < p.abs().median()] = 0


def quantization(start):
    with torch.no_grad():
        for name, p in start.named_parameters():
            if "lora_" in name:
                scale = p.abs().max() / 7
                p.copy_((p / scale).round() * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change", [dense_training, average, pruning, pruning_of_entries, quantization]
)
def test_weights_that_were_not_trained_under_another_mask(change, dtype, caplog):
    """Guards against a refusal or a false warning."""
    changed = lora_mlp()
    change(changed)
    state = {name: tensor.to(dtype) for name, tensor in changed.state_dict().items()}
    model = masked()
    model.load_state_dict(state)
    assert all(torch.equal(t, state[name].float()) for name, t in model.state_dict().items())
    assert WARNING not in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_of_the_same_mask_and_another_start(dtype, caplog):
    """Guards against a warning about what was drawn from another seed, or rounded."""
    trained, plain = masked(), lora_mlp(seed=2)
    train(trained)
    model = lora_mlp(seed=1)
    apply_mask(model, random_mask(model))
    for state in (trained.state_dict(), plain.state_dict()):
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()})
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, state[name].to(dtype).float())
    assert WARNING not in caplog.text


def test_sparse_weights_are_loaded_into_a_new_adapter(caplog):
    """Guards against zeros in common with a fresh B that make a state dict one of another mask."""
    model = lora_mlp(init_lora_weights=True)
    mask = random_mask(model)
    apply_mask(model, mask)
    name = "base_model.model.first.lora_B.default.weight"
    new = torch.zeros_like(model.state_dict()[name])
    new[:2] = 1.0
    model.load_state_dict({name: new}, strict=False)
    assert torch.equal(model.state_dict()[name], new)
    assert WARNING not in caplog.text
