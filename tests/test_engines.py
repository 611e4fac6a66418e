"""Engines that wrap or shard a model before it is masked."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from fish_tuning import FishConfig, apply_mask, get_fish_model, score_with_perturbed_b
from tests.models import batches_of, examples_for, tiny_llama
from tests.parallel import (
    Failing,
    assert_equal_scores,
    error_of,
    lora_bert,
    lora_llama,
    scored,
    trainable,
)
from tests.processes import in_processes


def wrapped(rank, batches):
    model = lora_bert()
    ddp = DistributedDataParallel(model)
    config = FishConfig(keep_ratio=0.5)
    mask = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in trainable(ddp).items()}
    errors = [
        error_of(apply_mask, ddp, mask),
        # Before anything is scored.
        error_of(get_fish_model, ddp, config, Failing(batches, fails=True), progress=False),
    ]
    scores = scored(ddp, batches), score_with_perturbed_b(ddp, batches, progress=False)
    return scores, errors


def test_wrapped_models(tmp_path):
    """Guards names with DDP's prefix, and a reducer that never sees the values."""
    model = lora_bert()
    batches = batches_of(examples_for(model, 6), 2)
    for scores, errors in in_processes(2, tmp_path / "a", wrapped, batches):
        assert_equal_scores(scores[0], scored(model, batches))
        assert_equal_scores(scores[1], score_with_perturbed_b(model, batches, progress=False))
        for kind, message in errors:
            assert kind == "ValueError" and "mask the model first, then wrap it" in message


def parallel(model):
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    return parallelize_module(model, mesh, {"model.layers.*.mlp.up_proj": ColwiseParallel()})


def by_columns(model):
    layer = model.model.layers[0].mlp
    fully_shard(layer, shard_placement_fn=lambda parameter: Shard(1))
    return model


def divided(rank, batches):
    cpu = torch.device("cpu")
    refused = {
        "FullyShardedDataParallel": FullyShardedDataParallel(
            lora_llama(), use_orig_params=True, device_id=cpu
        ),
        "tensor parallelism": parallel(tiny_llama()),
        "tensor parallelism, or fully_shard": by_columns(tiny_llama()),
    }
    errors = []
    for engine, model in refused.items():
        mask = {"weight": torch.ones(1, dtype=torch.bool)}
        errors.append((engine, error_of(scored, model, batches)))
        errors.append((engine, error_of(apply_mask, model, mask)))
    # Between passes, and after one that leaves the root's parameters complete.
    fsdp2 = fully_shard(lora_llama())
    masking = [error_of(apply_mask, fsdp2, mask)]
    with torch.no_grad():
        fsdp2(**batches[0])
    return errors, [*masking, error_of(apply_mask, fsdp2, mask)]


@pytest.mark.parametrize("count", [1, 2])
def test_divided_models(count, tmp_path):
    """Guards parts of parameters that are scored or masked as if they were whole."""
    batches = batches_of(examples_for(tiny_llama(), 4), 2)
    for errors, masking in in_processes(count, tmp_path / "a", divided, batches):
        for engine, (kind, message) in errors:
            assert kind == "ValueError" and message.startswith(engine)
            assert message.endswith("score and mask the model before it is sharded")
        for kind, message in masking:
            assert kind == "ValueError" and message.startswith("fully_shard has divided")
            assert message.endswith("and mask it before it is sharded")


def test_zero_3_is_refused():
    """Guards against scores of the empty tensors that DeepSpeed ZeRO-3 leaves in a model."""
    model = lora_bert()
    mask = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in trainable(model).items()}
    next(iter(trainable(model).values())).ds_id = 0
    for call in (lambda: scored(model, []), lambda: apply_mask(model, mask)):
        with pytest.raises(ValueError, match=r"DeepSpeed ZeRO-3 has divided .* before the engine"):
            call()
