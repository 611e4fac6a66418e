"""mask_trainer: scores with a Trainer's own loss, and a Trainer that trains what was selected."""

import copy

import numpy as np
import pytest
import torch
from transformers import Trainer

from fish_tuning import (
    FishConfig,
    FishMask,
    FishTuningCallback,
    get_fish_model,
    get_mask,
    mask_trainer,
    remove_mask,
)
from fish_tuning.from_trainer.masking import score_trainer
from tests.from_trainer.trainers import (
    ALL,
    TRAINERS,
    Weighted,
    bert,
    causal,
    dpo,
    own_loss_scores,
    plain,
)
from tests.models import assert_scores_close
from tests.training import arguments, assert_trained_where_selected, data_for, tensors_of, trainable

pytestmark = pytest.mark.filterwarnings("ignore")

TRAINED = ["plain", "subclass", "seq2seq", "sft", "dpo", "dpo-new-adapter", "reward", "kto"]


@pytest.mark.parametrize("name", [*TRAINED, "cosine"])
def test_the_masked_trainer_trains(name, tmp_path):
    """Guards Trainers whose optimizer misses the values, and frozen entries that move."""
    trainer = TRAINERS[name](tmp_path)
    before = tensors_of(trainer.model, trainable(trainer.model))
    mask = mask_trainer(trainer, FishConfig(keep_ratio=0.3), progress=False)
    assert mask == get_mask(trainer.model)
    assert mask.num_trainable == sum(p.numel() for p in trainable(trainer.model).values())
    loss = trainer.train().training_loss
    assert np.isfinite(loss)
    assert_trained_where_selected(trainer.model, mask, before)


@pytest.mark.parametrize(
    "name", ["plain", "cosine", pytest.param("dpo-new-adapter", marks=pytest.mark.slow)]
)
def test_checkpoints_hold_the_mask_and_resume(name, tmp_path):
    """Guards a resumed run of another mask, or of none."""

    def masked(seed):
        trainer = TRAINERS[name](tmp_path)
        trainer.args.save_strategy, trainer.args.save_steps = "steps", 3
        trainer.args.max_steps = 6
        mask_trainer(trainer, FishConfig(keep_ratio=0.3, seed=seed, criterion="random"))
        return trainer

    trainer = masked(0)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-3"
    assert FishMask.from_pretrained(checkpoint) == get_mask(trainer.model)
    resumed = masked(0)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    names = get_mask(trainer.model)
    for tensor, expected in zip(
        tensors_of(resumed.model, names).values(),
        tensors_of(trainer.model, names).values(),
        strict=True,
    ):
        torch.testing.assert_close(tensor, expected)
    with pytest.raises(ValueError, match="another mask"):
        masked(1).train(resume_from_checkpoint=str(checkpoint))


def test_the_usual_scores_are_those_of_get_fish_model(tmp_path):
    """Guards a second configuration: both select the same entries of the same batches."""
    trainer = plain(tmp_path)
    twin = copy.deepcopy(trainer.model)
    loader = trainer.get_eval_dataloader(trainer.train_dataset)  # In order.
    config = FishConfig(num_trainable=300, num_samples=None)
    trainer.args.per_device_train_batch_size = loader.batch_size or 8
    get_fish_model(twin, config, loader, progress=False)
    assert mask_trainer(trainer, config, progress=False) == get_mask(twin)


@pytest.mark.parametrize("config", [ALL, FishConfig(keep_ratio=0.5, criterion="magnitude"), None])
def test_configs(config, tmp_path):
    """Guards the default, criteria without data, and the record of the config."""
    trainer = plain(tmp_path)
    mask = mask_trainer(trainer, config, progress=False)
    expected = FishConfig(keep_ratio=0.5) if config is None else config
    assert mask.provenance["criterion"] == expected.criterion
    assert mask.provenance["trainer"] == "Trainer"
    assert "modules_to_save" in " ".join(mask)


def test_a_config_and_a_trainer_give_one_mask(tmp_path):
    """Guards masks that depend on random numbers drawn before."""
    config = FishConfig(keep_ratio=0.2, num_samples=3)
    masks = []
    for drawn in (0, 5):
        trainer = plain(tmp_path)
        torch.rand(drawn)
        masks.append(mask_trainer(trainer, config, progress=False))
    assert masks[0] == masks[1]
    trainer = plain(tmp_path)
    assert mask_trainer(trainer, config.model_copy(update={"seed": 1})) != masks[0]


# Trainers in other states


@pytest.mark.parametrize(
    "args",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=["bf16", "checkpointing", "reentrant"],
)
@pytest.mark.parametrize("build", [plain, pytest.param(dpo, marks=pytest.mark.slow)])
def test_prepared_models(build, args, tmp_path):
    """Guards models that accelerate has wrapped, and other ways to train."""
    trainer = build(tmp_path, args=args)
    trainer.evaluate(trainer.train_dataset)  # It prepares the model.
    before = tensors_of(trainer.model, trainable(trainer.model))
    _, scores = score_trainer(trainer, ALL, progress=False)
    rtol = 0.05 if "bf16" in args else 1e-4
    assert_scores_close(scores, own_loss_scores(trainer), rtol=rtol)
    mask = mask_trainer(trainer, progress=False)
    trainer.train()
    assert_trained_where_selected(trainer.model, mask, before)


def test_a_model_in_bfloat16(tmp_path):
    """Guards losses of half precision."""
    trainer = dpo(tmp_path, model=causal().bfloat16())
    _, scores = score_trainer(trainer, ALL, progress=False)
    assert_scores_close(scores, own_loss_scores(trainer), rtol=0.05)


def test_removing_the_mask_and_masking_again(tmp_path):
    """Guards a Trainer whose first mask was a mistake."""
    trainer = plain(tmp_path)
    first = mask_trainer(trainer, FishConfig(keep_ratio=0.2), progress=False)
    remove_mask(trainer.model)
    before = tensors_of(trainer.model, trainable(trainer.model))
    mask = mask_trainer(trainer, FishConfig(keep_ratio=0.4), progress=False)
    assert mask.num_trainable > first.num_trainable
    held = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert held.count(FishTuningCallback) == 1
    trainer.train()
    assert_trained_where_selected(trainer.model, mask, before)


# What cannot be scored


def trained(folder):
    trainer = plain(folder, args={"max_steps": 1})
    trainer.train()
    return trainer


def masked(folder):
    trainer = plain(folder)
    mask_trainer(trainer, FishConfig(keep_ratio=0.5, criterion="random"))
    return trainer


def stepped(folder):
    trainer = plain(folder)
    trainer.create_optimizer()
    for parameter in trainable(trainer.model).values():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    return trainer


def frozen(folder):
    model = bert()
    data = data_for(model, 4)
    return plain(folder, model=model.requires_grad_(False), train_dataset=data)


def replacing(folder):
    data = data_for(bert(), 4)
    return Trainer(model_init=lambda: bert(), args=arguments(folder), train_dataset=data)


class Online(Trainer):
    def _prepare_inputs(self, inputs):
        raise AssertionError("generates")


class Bare(Trainer):
    def get_train_dataloader(self):
        return [self.train_dataset[:2]]


class Twofold(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).logits


HALF = FishConfig(keep_ratio=0.5)


@pytest.mark.parametrize(
    ("build", "config", "error", "said"),
    [
        (lambda folder: bert(), HALF, TypeError, "trainer is a PeftModel.*: give a Trainer"),
        (plain, {"keep_ratio": 0.5}, TypeError, "config is a dict: give a FishConfig"),
        (trained, HALF, ValueError, "Trainer has begun to train: mask it before train()"),
        (stepped, HALF, ValueError, "Trainer has begun to train: mask it before train()"),
        (masked, HALF, ValueError, "the model has a mask already: call remove_mask"),
        (lambda folder: plain(folder, train_dataset=None), HALF, ValueError, "no train_dataset"),
        (lambda folder: plain(folder, train_dataset=[]), HALF, ValueError, "dataset .* is empty"),
        (frozen, HALF, ValueError, "no trainable parameter"),
        (replacing, HALF, ValueError, "model_init"),
        (lambda folder: plain(folder, Online), HALF, ValueError, "Online makes its training ex"),
        (lambda folder: plain(folder, Bare), HALF, ValueError, "Bare.get_train_dataloader"),
        (lambda folder: plain(folder, Twofold), HALF, ValueError, "Twofold.compute_loss returned"),
        (
            lambda folder: plain(folder, Weighted),
            FishConfig(keep_ratio=0.5, estimator="true"),
            ValueError,
            "Weighted has a loss of its own: use estimator='empirical'",
        ),
        (
            plain,
            FishConfig(num_trainable=10**6),
            ValueError,
            "num_trainable",
        ),
    ],
)
def test_mistakes(build, config, error, said, tmp_path):
    """Guards against mistakes that would end in a traceback or in another mask."""
    trainer = build(tmp_path)
    with pytest.raises(error, match=said):
        mask_trainer(trainer, config, progress=False)
