"""Under PyTorch's sharding in one process; `test_distributed.py` has several."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard

from fish_tuning import FishMask, apply_mask, get_mask, remove_mask
from tests.sparse.small import inputs, lora_mlp, random_mask


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("part", [lambda model: model, lambda model: model.base_model])
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_fsdp1_is_refused(use_orig_params, part, one_process):
    """Guards against a model that FSDP1 has changed before it turns out that it cannot train."""
    model = lora_mlp()
    mask = random_mask(model)
    apply_mask(model, mask)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = {"use_orig_params": use_orig_params, "device_id": torch.device("cpu")}
    with pytest.raises(ValueError, match=r"\(FSDP1\) cannot train a masked model: .* \(FSDP2"):
        FullyShardedDataParallel(part(model), **settings)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    FullyShardedDataParallel(remove_mask(model), **settings | {"use_orig_params": True})


def test_a_sharded_model_trains_as_it_does_without(one_process):
    """Guards against sharding that looks for values by their name, and finds tensors."""
    plain = lora_mlp()
    apply_mask(plain, random_mask(plain))
    masked = copy.deepcopy(plain)
    sharded: Any = fully_shard(masked, mesh=init_device_mesh("cpu", (1,)))
    for model in (plain, sharded):
        optimizer = torch.optim.AdamW(model.parameters(), 0.1)
        for step in range(3):
            optimizer.zero_grad()
            model(inputs(step)).square().sum().backward()
            optimizer.step()
    for name in random_mask(lora_mlp()):
        torch.testing.assert_close(sharded.state_dict()[name], plain.state_dict()[name])
    torch.testing.assert_close(sharded(inputs()), plain(inputs()))


@pytest.mark.parametrize(
    "call", [remove_mask, lambda model: model.merge_adapter(), lambda model: model.unload()]
)
def test_what_needs_whole_tensors_is_refused(call, one_process):
    """Guards against values that end up in the place of their tensor, without any error."""
    model = lora_mlp()
    apply_mask(model, random_mask(model))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    model(inputs()).sum().backward()
    with pytest.raises(RuntimeError, match="that fully_shard has divided among the processes"):
        call(model)
    model(inputs()).sum().backward()


def test_mixed_precision_of_own_weights_is_refused(one_process):
    """Guards against tensors that stay in float32 while the rest of the model is cast."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    mesh = init_device_mesh("cpu", (1,))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    whole, part = torch.ones(4, 4, dtype=torch.bool), torch.tensor([True, False])
    apply_mask(model, {"0.weight": whole, "1.bias": part})
    fully_shard(model, mesh=mesh, mp_policy=policy)
    with pytest.raises(RuntimeError, match=r"bfloat16, but not 1.bias, .* under autocast"):
        model(torch.ones(1, 4))
    adapter = lora_mlp()
    apply_mask(adapter, random_mask(adapter))
    fully_shard(adapter, mesh=mesh, mp_policy=policy)
    adapter(inputs()).sum().backward()


def test_all_that_belongs_to_adapters_is_saved(one_process, tmp_path):
    """Guards frozen tensors of an adapter, and another adapter, of which processes hold parts."""
    model = lora_mlp()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["last"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B.default" in name)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply_mask(model, {n: b for n, b in random_mask(model).items() if "lora_B.default" in n})
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    model.save_pretrained(tmp_path)
    for folder, adapter in ((tmp_path, "default"), (tmp_path / "second", "second")):
        saved = load_file(folder / "adapter_model.safetensors")
        expected = {name: tensor for name, tensor in before.items() if f".{adapter}." in name}
        assert len(saved) == len(expected) > 0
        for name, tensor in expected.items():
            assert torch.equal(saved[name.replace(f".{adapter}.", ".")], tensor)


def test_checkpoint_wrappers_leave_no_trace(one_process, tmp_path):
    """Guards accelerate's activation_checkpointing, with which PEFT alone saves no tensor."""
    model = lora_mlp()
    mask = apply_mask(model, random_mask(model)) and get_mask(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, BaseTunerLayer))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    model(inputs()).sum().backward()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.replace(".weight", ".default.weight") for name in saved} == {
        name for name in before if "lora_" in name
    }
    assert FishMask.from_pretrained(tmp_path) == mask
