"""Under PyTorch's sharding in one process; `test_distributed.py` has several."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from fish_tuning import apply_mask
from tests.sparse.small import inputs, lora_mlp, random_mask


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrapped_by_fsdp1(model):
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))


@pytest.mark.parametrize("wrap", [wrapped_by_fsdp1, fully_shard], ids=["FSDP1", "FSDP2"])
def test_a_sharded_model_trains_as_it_does_without(wrap, one_process):
    """Guards against sharding that looks for values by their name, and finds tensors."""
    plain = lora_mlp()
    apply_mask(plain, random_mask(plain))
    masked = copy.deepcopy(plain)
    sharded = wrap(masked)
    for model in (plain, sharded):
        optimizer = torch.optim.AdamW(model.parameters(), 0.1)
        for step in range(3):
            optimizer.zero_grad()
            model(inputs(step)).square().sum().backward()
            optimizer.step()
    state = {n.replace("_fsdp_wrapped_module.", ""): t for n, t in sharded.state_dict().items()}
    for name in random_mask(lora_mlp()):
        torch.testing.assert_close(state[name], plain.state_dict()[name])
    torch.testing.assert_close(sharded(inputs()), plain(inputs()))
