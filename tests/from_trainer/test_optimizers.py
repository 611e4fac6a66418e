"""Optimizers that were built before the Trainer was masked."""

import pytest
import torch

from fish_tuning import FishConfig, mask_trainer
from tests.from_trainer.trainers import plain
from tests.training import assert_trained_where_selected, tensors_of, trainable

pytestmark = pytest.mark.filterwarnings("ignore")


def own_optimizer(trainer, named):
    def group(rate, of_b):
        items = trainable(trainer.model).items()
        chosen = [item for item in items if ("lora_B" in item[0]) == of_b]
        return {"lr": rate, "params": chosen if named else [p for _, p in chosen]}

    return torch.optim.AdamW([group(0.02, True), group(0.01, False)])


@pytest.mark.parametrize("kind", ["created", "own", "named"])
def test_an_optimizer_that_exists_trains_the_values(kind, tmp_path):
    """Guards an optimizer that goes on with the dense parameters."""
    trainer = plain(tmp_path)
    if kind == "created":
        trainer.create_optimizer()
    else:
        trainer.optimizer = own_optimizer(trainer, kind == "named")
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    before = tensors_of(trainer.model, trainable(trainer.model))
    mask = mask_trainer(trainer, FishConfig(keep_ratio=0.1, scope="global"), progress=False)
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in trainable(trainer.model).values()}
    assert rates == [group["lr"] for group in trainer.optimizer.param_groups]
    trainer.train()
    assert_trained_where_selected(trainer.model, mask, before)
