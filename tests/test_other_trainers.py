"""FishTuningCallback in Seq2SeqTrainer and in TRL's Trainers."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

from fish_tuning import FishMask, FishTuningCallback, apply_mask
from tests.models import pad, tiny_bart, tiny_llama, tiny_t5, with_lora
from tests.training import (
    arguments,
    assert_trained_where_selected,
    data_for,
    random_mask,
    tensor_of,
    tensors_of,
    tiny_tokenizer,
    trainable,
)


class MaskedGradients(TrainerCallback):
    """The dense reference: zeroes the gradients outside a mask, clipping included."""

    def __init__(self, mask):
        self.mask = mask

    def on_init_end(self, args, state, control, model=None, **kwargs):
        parameters = dict(model.named_parameters())
        for name, bits in self.mask.items():
            parameters[name].register_hook(lambda gradient, own=bits: gradient * own)


def assert_close(model, twin, mask):
    for name in mask:
        expected = tensor_of(twin, name)
        torch.testing.assert_close(tensor_of(model, name), expected, rtol=1e-4, atol=1e-5, msg=name)


def assert_loads_plain(trainer, base, mask, folder):
    """What was saved is an adapter for PEFT alone, and the mask."""
    trainer.save_model(folder)
    assert FishMask.from_pretrained(folder) == FishMask(mask)
    loaded = PeftModel.from_pretrained(base, folder)
    for name in mask:
        assert torch.equal(tensor_of(loaded, name), tensor_of(trainer.model, name)), name
    return loaded


@pytest.mark.parametrize("build", [tiny_t5, tiny_bart], ids=lambda build: build.__name__)
def test_seq2seq_trainer(build, tmp_path):
    """Guards generation in evaluation: of the values as they are, not as they were."""
    model = with_lora(build(), init_lora_weights=False)
    mask, before = random_mask(model), tensors_of(model, trainable(model))
    data = [example | {"labels": example["labels"][:2]} for example in data_for(model)]
    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments(
            tmp_path,
            Seq2SeqTrainingArguments,
            predict_with_generate=True,
            generation_max_length=6,
            learning_rate=0.1,
        ),
        train_dataset=data,
        callbacks=[FishTuningCallback(mask)],
    )
    untrained = trainer.predict(data).predictions
    trainer.train()
    predicted = trainer.predict(data).predictions
    assert_trained_where_selected(model, mask, before)
    assert untrained.shape != predicted.shape or (untrained != predicted).any()
    plain = assert_loads_plain(trainer, build(), mask, tmp_path / "saved").eval()
    for start in (0, 8):
        batch = pad(data[start : start + 8])
        ids, attention = batch["input_ids"], batch["attention_mask"]
        expected = plain.generate(input_ids=ids, attention_mask=attention, max_length=6)
        actual = torch.as_tensor(predicted[start : start + 8])
        assert torch.equal(actual[:, : expected.shape[1]], expected)
        assert (actual[:, expected.shape[1] :] <= 0).all()  # Padding, with 0 or -100.


def lora_llama():
    model = tiny_llama(max_position_embeddings=64)
    return with_lora(model, init_lora_weights=False, lora_dropout=0.0)


def trl_trainer(kind, model, folder, callbacks, **settings):
    trl = pytest.importorskip("trl")
    if kind == "sft":
        text = ["the fish swims up the river", "the fish swims down again", "up the river"] * 4
        trainer, config, columns = trl.SFTTrainer, trl.SFTConfig, {"text": text}
    else:
        trainer, config = trl.DPOTrainer, trl.DPOConfig
        columns = {
            "prompt": ["the fish", "the river", "down"] * 4,
            "chosen": [" swims up", " and the fish", " again"] * 4,
            "rejected": [" down again", " swims", " the river up"] * 4,
        }
    options = {key: settings.pop(key) for key in ("peft_config",) if key in settings}
    return trainer(
        model=model,
        args=arguments(
            folder, config, max_length=16, bf16=False, max_grad_norm=0.0, seed=1, **settings
        ),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tiny_tokenizer(),
        callbacks=callbacks,
        **options,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "no-checkpointing"])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trl_trains_as_a_dense_reference(kind, checkpointing, tmp_path):
    """Guards TRL's Trainers, which cast, wrap and checkpoint the model as they like."""
    model, twin = lora_llama(), lora_llama()
    mask, before = random_mask(model), tensors_of(model, trainable(model))
    settings = {"gradient_checkpointing": checkpointing, "weight_decay": 0.0}
    trainer = trl_trainer(kind, model, tmp_path, [FishTuningCallback(mask)], **settings)
    assert sum(p.numel() for p in trainable(model).values()) == FishMask(mask).num_trainable
    trainer.train()
    trl_trainer(kind, twin, tmp_path, [MaskedGradients(mask)], **settings).train()
    assert_trained_where_selected(model, mask, before)
    assert_close(model, twin, mask)
    assert_loads_plain(trainer, tiny_llama(max_position_embeddings=64), mask, tmp_path / "saved")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trl_keeps_frozen_entries_under_weight_decay(kind, tmp_path):
    """Guards the bits of frozen entries in TRL's optimizers."""
    model = lora_llama()
    mask, before = random_mask(model), tensors_of(model, trainable(model))
    trl_trainer(kind, model, tmp_path, [FishTuningCallback(mask)], weight_decay=0.5).train()
    assert_trained_where_selected(model, mask, before)


def completion_log_probs(model, inputs):
    """log p of each completion, (2 b,): those chosen, then those rejected."""
    with torch.no_grad():
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    log_probs = logits[:, :-1].log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None])[..., 0]
    return (log_probs * inputs["completion_mask"][:, 1:]).sum(1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reference", ["disabled-adapter", "copied-adapter"])
def test_dpo_reference_is_the_start(reference, tmp_path):
    """Guards log-probabilities of the reference that move with the values in training."""
    lora = {}
    if reference == "copied-adapter":
        model = lora_llama()
        start = copy.deepcopy(model).eval()
        mask = random_mask(model)
    else:
        model = tiny_llama(max_position_embeddings=64)
        start = copy.deepcopy(model).eval()
        mask = random_mask(with_lora(copy.deepcopy(model)))
        lora["peft_config"] = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trl_trainer("dpo", model, tmp_path, [FishTuningCallback(mask)], **lora)
    trainer.train()
    inputs = next(iter(trainer.get_train_dataloader()))
    found = torch.cat(trainer.compute_ref_log_probs(trainer.model, inputs))
    torch.testing.assert_close(found, completion_log_probs(start, inputs), rtol=1e-4, atol=1e-5)
    now = completion_log_probs(trainer.model.eval(), inputs)
    assert (now - found).abs().max() > 0.01


@pytest.mark.filterwarnings("ignore")
def test_dpo_of_a_model_masked_before_is_refused(tmp_path):
    """Guards against a reference that lacks what is masked: TRL copies parameters alone."""
    model = lora_llama()
    apply_mask(model, random_mask(model))
    with pytest.raises(ValueError, match=r"'ref'.*FishTuningCallback\(mask\)"):
        trl_trainer("dpo", model, tmp_path, [FishTuningCallback()])
