"""Engines that wrap or shard a model before it is masked."""

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from fish_tuning import FishConfig, apply_mask, get_fish_model, score_with_perturbed_b
from tests.models import batches_of, examples_for
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
    sharded = []
    cpu = torch.device("cpu")
    for model in (
        fully_shard(lora_llama()),
        FullyShardedDataParallel(lora_llama(), use_orig_params=True, device_id=cpu),
    ):
        sharded.append(error_of(scored, model, batches))
        sharded.append(error_of(apply_mask, model, mask))
    return scores, errors, sharded


def test_wrapped_and_sharded_models(tmp_path):
    """Guards names with DDP's prefix, a reducer that never sees the values, and parts of
    parameters that are scored as if they were whole."""
    model = lora_bert()
    batches = batches_of(examples_for(model, 6), 2)
    for scores, errors, sharded in in_processes(2, tmp_path / "a", wrapped, batches):
        assert_equal_scores(scores[0], scored(model, batches))
        assert_equal_scores(scores[1], score_with_perturbed_b(model, batches, progress=False))
        for kind, message in errors:
            assert kind == "ValueError" and "mask the model first, then wrap it" in message
        for kind, message in sharded:
            assert kind == "ValueError"
            assert message.endswith("score and mask the model before it is sharded")
        assert "FullyShardedDataParallel has divided" in sharded[2][1]


def test_zero_3_is_refused():
    """Guards against scores of the empty tensors that DeepSpeed ZeRO-3 leaves in a model."""
    model = lora_bert()
    mask = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in trainable(model).items()}
    next(model.parameters()).ds_id = 0
    for call in (lambda: scored(model, []), lambda: apply_mask(model, mask)):
        with pytest.raises(ValueError, match=r"DeepSpeed ZeRO-3 has divided .* before it is"):
            call()
