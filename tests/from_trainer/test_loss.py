"""Which loss is scored: the Trainer's own, of one example."""

import importlib

import pytest
from transformers import Trainer

from fish_tuning import get_mask, mask_trainer
from fish_tuning.from_trainer.loss import trains_on_model_loss
from fish_tuning.from_trainer.masking import score_trainer
from tests.from_trainer.trainers import (
    ALL,
    PAIRS,
    SCORED_PAIRS,
    TRAINERS,
    TRIPLES,
    Weighted,
    own_loss_scores,
    plain,
    sentence_trainer,
    sft,
)
from tests.models import assert_scores_close
from tests.training import assert_trained_where_selected, tensors_of, trainable

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("build", TRAINERS.values(), ids=TRAINERS)
def test_scores_are_those_of_the_trainers_own_loss(build, tmp_path):
    """Guards the loss, the collator and the data that the Trainer trains with."""
    trainer = build(tmp_path)
    _, scores = score_trainer(trainer, ALL, progress=False)
    assert_scores_close(scores, own_loss_scores(trainer), rtol=1e-4)


@pytest.mark.parametrize(
    "args",
    [{"padding_free": True}, {"packing": True, "max_length": 16}],
    ids=["padding-free", "packed"],
)
def test_rows_of_several_examples(args, tmp_path):
    """Guards TRL's ways to avoid padding: scores are by example, and counted by example."""
    expected = own_loss_scores(sft(tmp_path))
    trainer = sft(tmp_path, args={"max_length": None, **args})
    _, scores = score_trainer(trainer, ALL, progress=False)
    assert_scores_close(scores, expected, rtol=1e-4)


@pytest.mark.parametrize("build", [plain, sft])
def test_a_models_own_loss_takes_one_pass(build, tmp_path, monkeypatch):
    """Guards the speed of the usual Trainers."""
    trainer = build(tmp_path)
    monkeypatch.setattr(type(trainer), "compute_loss", type(trainer).compute_loss)
    calls = []
    trainer.model.register_forward_pre_hook(lambda *args: calls.append(args))
    score_trainer(trainer, ALL, progress=False)
    batches = -(-len(trainer.train_dataset) // trainer.args.per_device_train_batch_size)
    # One example, by which the loss is recognized; one with and without its padding.
    assert len(calls) <= batches + 3


@pytest.mark.parametrize(
    ("loss", "columns", "said"),
    [
        ("MultipleNegativesRankingLoss", PAIRS, "MultipleNegativesRankingLoss has no gradient"),
        ("CoSENTLoss", SCORED_PAIRS, "CoSENTLoss has no gradient for one example alone"),
        (
            "CachedMultipleNegativesRankingLoss",
            TRIPLES,
            "same name without 'Cached'",
        ),
    ],
)
def test_losses_of_a_whole_batch(loss, columns, said, tmp_path):
    """Guards a mask by position, where one example has no gradient."""
    trainer = sentence_trainer(
        tmp_path, lambda losses, model: getattr(losses, loss)(model), columns
    )
    with pytest.raises(ValueError, match=said):
        mask_trainer(trainer, progress=False)
    assert get_mask(trainer.model) is None


def test_packed_rows_of_another_loss_are_refused(tmp_path):
    """Guards a row of several examples that is scored as one."""
    trainer = sft(tmp_path, args={"loss_type": "dft", "packing": True, "max_length": 16})
    with pytest.raises(ValueError, match=r"several examples.*set packing=False"):
        mask_trainer(trainer, progress=False)


def test_whose_loss_it_is(tmp_path):
    """Guards one pass with the model's loss, where the Trainer computes another one."""
    assert trains_on_model_loss(plain(tmp_path))
    assert trains_on_model_loss(sft(tmp_path))
    own = ["label-smoothing", "subclass", "compute-loss-func", "sft-dft", "dpo", "reward", "kto"]
    assert not any(trains_on_model_loss(TRAINERS[name](tmp_path)) for name in own)
    trainer = plain(tmp_path)
    trainer.compute_loss = lambda *args, **kwargs: None
    assert not trains_on_model_loss(trainer)


def test_negatives_of_other_processes_are_refused(tmp_path, monkeypatch):
    """Guards an example that is its own negative, because all processes score it."""

    def loss(losses, model):
        return losses.MultipleNegativesRankingLoss(model, gather_across_devices=True)

    trainer = sentence_trainer(tmp_path, loss, TRIPLES)
    monkeypatch.setattr("fish_tuning.from_trainer.loss.world", lambda: (0, 2))
    with pytest.raises(ValueError, match="gather_across_devices=True"):
        mask_trainer(trainer, progress=False)


def test_a_model_masked_under_its_trainer(tmp_path):
    """Guards the way out for losses that cannot be scored: another loss for the call."""

    def cached(losses, model):
        return losses.CachedMultipleNegativesRankingLoss(model)

    trainer = sentence_trainer(tmp_path, cached, TRIPLES)
    own = trainer.loss
    losses = importlib.import_module("sentence_transformers.sentence_transformer.losses")
    trainer.loss = losses.MultipleNegativesRankingLoss(trainer.model)
    before = tensors_of(trainer.model, trainable(trainer.model))
    mask = mask_trainer(trainer, progress=False)
    trainer.loss = own
    trainer.train()
    assert_trained_where_selected(trainer.model, mask, before)


class TurnsDropoutOn(Weighted):
    def compute_loss(self, model, inputs, **options):
        model.train()
        return super().compute_loss(model, inputs, **options)


class TurnsPartsOn(Weighted):
    def compute_loss(self, model, inputs, **options):
        model.base_model.train()
        return super().compute_loss(model, inputs, **options)


def test_a_loss_that_turns_dropout_on(tmp_path):
    """Guards scores of a random part of the model."""
    _, expected = score_trainer(plain(tmp_path, Weighted), ALL, progress=False)
    trainer = plain(tmp_path, TurnsDropoutOn)
    _, scores = score_trainer(trainer, ALL, progress=False)
    assert_scores_close(scores, expected)
    assert "train" not in vars(trainer.model)
    with pytest.raises(ValueError, match=r"TurnsPartsOn.compute_loss turns on the training mode"):
        score_trainer(plain(tmp_path, TurnsPartsOn), ALL, progress=False)


class Adversarial(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        return super().training_step(model, inputs, num_items_in_batch)


def test_a_training_step_of_its_own_is_told(tmp_path, caplog):
    """Guards silence about a loss that is not all that a Trainer trains with."""
    mask_trainer(plain(tmp_path, Adversarial), progress=False)
    assert "Adversarial has a training_step of its own: scored is the loss" in caplog.text
    caplog.clear()
    for build in (plain, sft):
        mask_trainer(build(tmp_path), progress=False)
    assert "training_step" not in caplog.text
