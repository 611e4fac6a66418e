"""Under PyTorch's sharding in one process; `test_distributed.py` has several."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from fish_tuning import apply_mask, remove_mask
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
