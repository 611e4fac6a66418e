"""A Trainer is left as it was by scoring."""

import copy
import random

import numpy as np
import pytest
import torch

from fish_tuning import FishConfig, mask_trainer
from fish_tuning.from_trainer.masking import score_trainer
from tests.from_trainer.trainers import TRAINERS, plain, sft

pytestmark = pytest.mark.filterwarnings("ignore")


def states():
    numpy = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2:]


@pytest.mark.parametrize("name", ["plain", "subclass", "sft", "dpo", "kto", "cosine"])
def test_the_trainer_is_left_as_it_was(name, tmp_path):
    """Guards metrics, counters and logs of examples that were only scored."""
    trainer = TRAINERS[name](tmp_path)
    parts = [trainer, trainer.state, trainer.control, trainer.accelerator]
    before = [dict(vars(part)) for part in parts]
    contents = copy.deepcopy([trainer.state, getattr(trainer, "_metrics", None)])
    generators = states()
    modes = [module.training for module in trainer.model.modules()]
    score_trainer(trainer, FishConfig(keep_ratio=0.5, num_samples=3), progress=False)
    for part, attributes in zip(parts, before, strict=True):
        assert vars(part).keys() == attributes.keys()
        assert all(vars(part)[key] is value for key, value in attributes.items())
    assert contents == [trainer.state, getattr(trainer, "_metrics", None)]
    assert generators == states()
    assert modes == [module.training for module in trainer.model.modules()]
    assert all(p.grad is None for p in trainer.model.parameters())


def trained_on(trainer):
    torch.manual_seed(3)
    return [batch["input_ids"].tolist() for batch in trainer.get_train_dataloader()]


@pytest.mark.parametrize("build", [plain, sft])
def test_the_order_of_the_data_stays(build, tmp_path):
    """Guards training that sees its examples in another order because of scoring."""
    expected = trained_on(build(tmp_path))
    trainer = build(tmp_path)
    mask_trainer(trainer, progress=False)
    assert trained_on(trainer) == expected
