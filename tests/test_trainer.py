"""FishTuningTrainer and FishTuningCallback in transformers' training loop."""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch._dynamo import OptimizedModule
from transformers import Trainer, TrainerCallback

from fish_tuning import (
    FishConfig,
    FishMask,
    FishTuningCallback,
    FishTuningTrainer,
    apply_mask,
    get_mask,
    mask_trainer,
    remove_mask,
)
from tests.models import (
    OLD_TRANSFORMERS,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_roberta,
    tiny_t5,
    with_lora,
)
from tests.training import (
    KILLED_AT,
    STEPS,
    Classifier,
    arguments,
    assert_trained_where_selected,
    checkpointed_run,
    data_for,
    lora_bert,
    points,
    random_mask,
    tensor_of,
    tensors_of,
    trainable,
    trainer_for,
)


def files_in(folder):
    return {file.name for file in Path(folder).iterdir()}


class SelfSaving(Classifier):
    """A plain module with a save_pretrained that Trainer does not call."""

    def save_pretrained(self, save_directory):
        raise NotImplementedError


# Training


class Decay(TrainerCallback):
    """Decays the selected entries that Trainer decays, before the optimizer's step."""

    def __init__(self, mask, rate):
        self.mask, self.rate = mask, rate

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        for name, p in model.named_parameters():
            if "bias" not in name and "LayerNorm" not in name:
                p -= optimizer.param_groups[0]["lr"] * self.rate * p * self.mask[name]


def test_training_equals_a_dense_reference(tmp_path):
    """Guards against masked biases and LayerNorms that decay, which Trainer never lets decay."""
    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0)
    model = tiny_bert(**dropout).double()
    twin, mask = copy.deepcopy(model), random_mask(model)
    for name in mask:
        if "key.bias" in name:
            mask[name].zero_()  # The softmax takes no notice of it: its gradient is rounding.
    assert sum("LayerNorm" in name or "bias" in name for name in mask) > 20
    settings = {"max_steps": 20, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    trainer_for(model, tmp_path, mask, **settings).train()
    for name, p in twin.named_parameters():
        p.register_hook(lambda gradient, bits=mask[name]: gradient * bits)
    Trainer(
        model=twin,
        args=arguments(tmp_path, **settings, **{"weight_decay": 0}),
        train_dataset=data_for(twin),
        callbacks=[Decay(mask, 0.1)],
    ).train()
    for name in mask:
        expected = tensor_of(twin, name)
        torch.testing.assert_close(tensor_of(model, name), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "build", [tiny_bert, tiny_roberta, tiny_llama, tiny_gpt2, tiny_t5], ids=lambda b: b.__name__
)
def test_weight_decay_is_trainers_own(build, tmp_path):
    """Guards against norms and biases of other models, by whatever name, that decay."""
    model = build()
    mask, before = random_mask(model, 0.5), tensors_of(model, trainable(model))
    plain = Trainer(model=build(), args=arguments(tmp_path))
    decayed = set(plain.get_decay_parameter_names(plain.model))
    assert decayed & set(mask) and set(mask) - decayed
    trainer = trainer_for(model, tmp_path, mask)
    optimizer = trainer.create_optimizer()
    for p in trainable(model).values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, bits in mask.items():
        moved = tensor_of(model, name) != before[name]
        expected = bits & (before[name] != 0) & (name in decayed)
        assert torch.equal(moved, expected), name


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing_trains_the_same(reentrant, tmp_path):
    """Guards against Trainer's own way of checkpointing, which readies the model for it."""
    if OLD_TRANSFORMERS and reentrant:
        pytest.skip("the Trainer readies models for it from transformers 5 on")
    results = []
    for checkpointed in (False, True):
        model = with_lora(tiny_llama(), init_lora_weights=False, lora_dropout=0.0)
        mask, before = random_mask(model), tensors_of(model, trainable(model))
        trainer_for(
            model,
            tmp_path,
            mask,
            gradient_checkpointing=checkpointed,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        ).train()
        assert_trained_where_selected(model, mask, before)
        results.append(tensors_of(model, mask))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_training_equals_eager(tmp_path):
    """Guards against a graph that holds the tensors of another step, or misses the gradients."""
    results = []
    for compiled in (False, True):
        model = lora_bert(dropout=False)
        mask, before = random_mask(model), tensors_of(model, trainable(model))
        trainer = trainer_for(
            model,
            tmp_path,
            mask,
            **({"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}),
        )
        trainer.train()
        assert isinstance(trainer.model_wrapped, OptimizedModule) == compiled
        assert_trained_where_selected(model, mask, before)
        results.append(tensors_of(model, mask))
    for name, tensor in results[0].items():
        torch.testing.assert_close(results[1][name], tensor, rtol=1e-5, atol=1e-6)


def test_a_masked_model_needs_no_mask(tmp_path):
    """Guards against a second mask on a model that get_fish_model has masked."""
    model = lora_bert()
    mask, before = random_mask(model), tensors_of(model, trainable(model))
    apply_mask(model, mask)
    trainer = trainer_for(model, tmp_path)
    trainer.train()
    assert_trained_where_selected(model, mask, before)
    assert sum(p.numel() for p in trainable(model).values()) == FishMask(mask).num_trainable


def test_evaluation_sees_the_trained_values(tmp_path):
    """Guards against an evaluation of the model as it was."""
    model = lora_bert()
    mask = random_mask(model)
    trainer = trainer_for(model, tmp_path, mask)
    before = trainer.evaluate(data_for(model))["eval_loss"]
    trainer.train()
    after = trainer.evaluate(data_for(model))["eval_loss"]
    assert abs(after - before) > 1e-3
    assert trainer.evaluate(data_for(model))["eval_loss"] == after
    remove_mask(model)
    assert trainer.evaluate(data_for(model))["eval_loss"] == pytest.approx(after, abs=1e-7)


# Files


def test_saved_model_is_the_plain_adapter(tmp_path):
    """Guards against names of ours in the adapter file, a mask left out, values left behind."""
    model, plain = lora_bert(), lora_bert()
    plain.save_pretrained(tmp_path / "plain")
    mask = random_mask(model)
    trainer = trainer_for(model, tmp_path, mask, save_strategy="steps", save_steps=STEPS)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    names = set(load_file(tmp_path / "plain/adapter_model.safetensors"))
    examples = data_for(model)
    batch = {key: torch.stack([e[key] for e in examples]) for key in examples[0]}
    model.eval()
    with torch.no_grad():
        expected = model(**batch).logits
        assert not torch.allclose(plain.eval()(**batch).logits, expected, atol=1e-3)
        for folder in (tmp_path / "saved", tmp_path / f"checkpoint-{STEPS}"):
            assert set(load_file(folder / "adapter_model.safetensors")) == names
            assert FishMask.from_pretrained(folder) == FishMask(mask)
            loaded = PeftModel.from_pretrained(tiny_bert(), folder).eval()
            assert torch.equal(loaded(**batch).logits, expected)
    assert {"fish_mask.json", "fish_mask.safetensors"} <= files_in(tmp_path / "saved")


@pytest.mark.parametrize("kind", [Classifier, SelfSaving])
def test_plain_module(kind, tmp_path):
    """Guards against checkpoints of a module without PEFT that have no mask and do not resume."""
    settings = {"save_strategy": "steps", "save_steps": KILLED_AT}

    def trainer(model, **more):
        return FishTuningTrainer(
            model=model,
            args=arguments(tmp_path, **settings, **more),
            train_dataset=points(),
            mask=random_mask(model),
        )

    model = kind()
    mask, before = random_mask(model, 0.5), tensors_of(model, trainable(model))
    mask = random_mask(model)
    trainer(model).train()
    assert_trained_where_selected(model, mask, before)
    saved = load_file(tmp_path / f"checkpoint-{STEPS}/model.safetensors")
    assert saved.keys() == before.keys()
    for name, tensor in saved.items():
        assert torch.equal(tensor, tensor_of(model, name))
    assert FishMask.from_pretrained(tmp_path / f"checkpoint-{STEPS}") == FishMask(mask)
    again = kind()
    trainer(again).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{KILLED_AT}"))
    for name in mask:
        assert torch.equal(tensor_of(again, name), tensor_of(model, name)), name


def test_killed_run_resumes_bit_for_bit(tmp_path):
    """Guards against resuming with values, moments or dropout that the run did not have."""
    whole = checkpointed_run(tmp_path / "whole")
    code = (
        "import sys; from tests.training import Kill, checkpointed_run, KILLED_AT; "
        "checkpointed_run(sys.argv[1], [Kill(KILLED_AT)])"
    )
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "killed")],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert {f for f in files_in(tmp_path / "killed") if "check" in f} == {"checkpoint-2"}
    resumed = checkpointed_run(tmp_path / "killed", resume=True)
    mask, before = random_mask(lora_bert()), tensors_of(lora_bert(), trainable(lora_bert()))
    for name in mask:
        assert torch.equal(tensor_of(resumed, name), tensor_of(whole, name)), name
    assert_trained_where_selected(resumed, mask, before)


def test_resume_with_another_mask_is_refused(tmp_path):
    """Guards against optimizer moments that end on other entries than they belong to."""
    checkpointed_run(tmp_path)
    model = lora_bert()
    trainer = trainer_for(model, tmp_path, random_mask(model, seed=1))
    with pytest.raises(ValueError, match=r"checkpoint-6.*another mask.*FishMask\.from_pretrained"):
        trainer.train(resume_from_checkpoint=True)


def test_resume_without_a_mask_file_is_refused(tmp_path):
    """Guards against going on from a dense run's checkpoint as if it had been masked."""
    checkpointed_run(tmp_path)
    (tmp_path / "checkpoint-6/fish_mask.json").unlink()
    model = lora_bert()
    trainer = trainer_for(model, tmp_path, random_mask(model))
    with pytest.raises(FileNotFoundError, match=r"fish_mask\.json does not exist"):
        trainer.train(resume_from_checkpoint=True)


class Record(TrainerCallback):
    def __init__(self, names):
        self.names, self.seen = names, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen[state.global_step] = tensors_of(model, self.names)


class BestIs(TrainerCallback):
    """Makes the evaluation at a step the best."""

    def __init__(self, step):
        self.step = step

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_loss"] = abs(state.global_step - self.step)


@pytest.mark.parametrize("kind", ["peft", "module"])
def test_best_model_is_restored(kind, tmp_path):
    """Guards against a best model that the next forward overwrites with the last values."""
    model = lora_bert() if kind == "peft" else Classifier()
    data = data_for(model) if kind == "peft" else points()
    mask, before = random_mask(model), tensors_of(model, trainable(model))
    record = Record(list(mask))
    marks = iter([0.1, 0.9, 0.2])
    trainer = FishTuningTrainer(
        model=model,
        args=arguments(
            tmp_path,
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="mark",
            greater_is_better=True,
        ),
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda prediction: {"mark": next(marks)},
        mask=mask,
        callbacks=[record],
    )
    trainer.train()
    best, last = record.seen[4], record.seen[6]
    assert any(not torch.equal(best[name], last[name]) for name in mask)
    for _ in range(2):
        for name in mask:
            assert torch.equal(tensor_of(model, name), best[name]), name
        with torch.no_grad():
            trainer.prediction_step(model, trainer.data_collator(data[:4]), True)
    assert_trained_where_selected(model, mask, before)
    remove_mask(model)
    for name in mask:
        assert torch.equal(tensor_of(model, name), best[name]), name


def test_training_goes_on_from_the_best_model(tmp_path):
    """Guards against values that the best model's tensors and the next steps do not share."""
    model, twin = lora_bert(dropout=False), lora_bert(dropout=False)
    data, mask = data_for(model), random_mask(model)
    trainer_for(
        model,
        tmp_path,
        mask,
        callbacks=[BestIs(2)],
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
    ).train()
    twin.load_state_dict(model.state_dict())
    for name, p in trainable(twin).items():
        p.register_hook(lambda gradient, bits=mask[name]: gradient * bits)
    batch = {key: torch.stack([example[key] for example in data]) for key in data[0]}
    for each in (model, twin):
        optimizer = torch.optim.AdamW(trainable(each).values(), 0.01, weight_decay=0)
        for _ in range(3):
            each(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name in mask:
        expected = tensor_of(twin, name)
        torch.testing.assert_close(tensor_of(model, name), expected, rtol=1e-5, atol=1e-6)


# A config in the place of a mask


class Weighted(FishTuningTrainer):
    """A subclass that needs an attribute of its own for its loss."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weights = torch.tensor([0.5, 1.0, 2.0])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return torch.nn.functional.cross_entropy(outputs.logits, inputs["labels"], self.weights)


def configured(folder, kind=FishTuningTrainer, model=None, **settings):
    model = lora_bert() if model is None else model
    return kind(
        model=model,
        args=arguments(folder, **settings),
        train_dataset=data_for(model),
        fish_config=FishConfig(keep_ratio=0.3, num_samples=5),
    )


@pytest.mark.parametrize("kind", [FishTuningTrainer, Weighted])
def test_a_config_masks_when_training_starts(kind, tmp_path):
    """Guards subclasses whose loss needs more than Trainer's constructor has set."""
    trainer = configured(tmp_path, kind)
    before = tensors_of(trainer.model, trainable(trainer.model))
    assert get_mask(trainer.model) is None
    trainer.train()
    mask = get_mask(trainer.model)
    assert_trained_where_selected(trainer.model, mask, before)
    twin = configured(tmp_path / "twin", kind)
    assert mask_trainer(twin, twin.fish_config, progress=False) == mask
    twin.train()  # It has a mask already.


def test_a_config_resumes_with_the_mask_of_the_checkpoint(tmp_path, monkeypatch):
    """Guards against another selection after a restart from another start."""
    trainer = configured(tmp_path, save_strategy="steps", save_steps=KILLED_AT)
    trainer.train()
    checkpoint = tmp_path / f"checkpoint-{KILLED_AT}"
    monkeypatch.setattr("fish_tuning.trainer.mask_trainer", None)  # Nothing is scored again.
    other = with_lora(tiny_bert(), seed=7, init_lora_weights=False, lora_dropout=0.1)
    resumed = configured(tmp_path, model=other)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert get_mask(other) == get_mask(trainer.model)
    assert get_mask(other).provenance == get_mask(trainer.model).provenance
    for name in get_mask(other):
        assert torch.equal(tensor_of(other, name), tensor_of(trainer.model, name)), name


def test_a_config_beside_a_mask(tmp_path):
    """Guards against one of the two that is silently ignored."""
    model = lora_bert()
    apply_mask(model, random_mask(model))
    with pytest.raises(ValueError, match="give fish_config or a mask"):
        configured(tmp_path, model=model)


# Errors


def test_no_mask_at_all(tmp_path):
    """Guards against dense training by somebody who forgot the mask."""
    with pytest.raises(ValueError, match=r"no mask: pass one.*get_fish_model"):
        trainer_for(lora_bert(), tmp_path)


def test_mask_of_another_model(tmp_path):
    """Guards against a Trainer that leaves the model half masked when the mask does not fit."""
    model = lora_bert()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="Was it made for another model"):
        trainer_for(model, tmp_path, random_mask(with_lora(tiny_llama())))
    assert [name for name, _ in model.named_parameters()] == names
    assert get_mask(model) is None


def test_mask_for_a_masked_model(tmp_path):
    """Guards against a mask that is silently ignored, or laid over the first."""
    model = lora_bert()
    mask = random_mask(model)
    apply_mask(model, mask)
    with pytest.raises(ValueError, match="has a mask already"):
        trainer_for(model, tmp_path, mask)


def test_optimizer_built_before_the_mask(tmp_path):
    """Guards against an optimizer that steps parameters no longer in the model."""
    model = lora_bert()
    mask = random_mask(model)
    optimizer = torch.optim.AdamW(trainable(model).values(), 0.01)
    trainer = FishTuningTrainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=data_for(model),
        mask=mask,
        optimizers=(optimizer, None),
    )
    before = tensors_of(model, mask)
    with pytest.raises(RuntimeError, match="optimizer was built before the mask"):
        trainer.train()
    assert all(torch.equal(tensor_of(model, name), tensor) for name, tensor in before.items())


def test_optimizer_built_after_the_mask(tmp_path):
    """Guards against refusing an optimizer of the user's that is right."""
    model = lora_bert()
    mask, before = random_mask(model), tensors_of(model, trainable(model))
    apply_mask(model, mask)
    optimizer = torch.optim.SGD(trainable(model).values(), 0.5)
    FishTuningTrainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=data_for(model),
        optimizers=(optimizer, None),
    ).train()
    assert_trained_where_selected(model, mask, before)


@pytest.mark.parametrize(("rate", "density", "told"), [(2e-4, 0.02, 1), (1e-2, 0.02, 0)])
def test_a_rate_of_dense_adapters_is_told(rate, density, told, tmp_path, caplog):
    """Guards users who keep LoRA's rate: with few entries, little would happen."""
    model = lora_bert()
    mask = random_mask(model, density)
    trainer_for(model, tmp_path, mask, learning_rate=rate, max_steps=1, warmup_steps=2).train()
    assert caplog.text.count("may be too low: the mask selects") == told


def test_callback_added_late(tmp_path):
    """Guards against dense training because the callback missed the Trainer's construction."""
    model = lora_bert()
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=data_for(model))
    trainer.add_callback(FishTuningCallback(random_mask(model)))
    with pytest.raises(RuntimeError, match=r"came after the Trainer was built.*callbacks="):
        trainer.train()


def test_model_init_is_refused(tmp_path):
    """Guards against a fresh dense model that takes the masked one's place in train()."""
    trainer = FishTuningTrainer(
        model_init=lora_bert,
        args=arguments(tmp_path),
        train_dataset=data_for(lora_bert()),
        mask=random_mask(lora_bert()),
    )
    with pytest.raises(RuntimeError, match="model_init is not supported"):
        trainer.train()
