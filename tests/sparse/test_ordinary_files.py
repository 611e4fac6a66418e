"""Files lie beside the weights they describe; training resumes with the mask it began with."""

import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from fish_tuning import (
    FishMask,
    FishTuningCallback,
    FishTuningTrainer,
    apply_mask,
    create_mask_from_fisher,
    get_mask,
    random_scores,
)
from tests.models import examples_for, tiny_bert, with_lora
from tests.sparse.twins import (
    LORA,
    Net,
    assert_close,
    base_model,
    config_of,
    inputs,
    output_of,
    random_bits,
    seeded,
)

MASK_FILES = {"fish_mask.json", "fish_mask.safetensors"}


def files_of(folder):
    return {os.path.relpath(f, folder) for f in folder.rglob("*") if f.is_file()}


def masked(adapter="default"):
    model = seeded(
        lambda: get_peft_model(base_model("lora"), config_of("lora"), adapter_name=adapter), 1
    )
    return apply_mask(model.double(), random_bits(model, 2))


# Where files lie


@pytest.mark.parametrize("adapter", ["default", "mine", "v1.2"])
def test_the_mask_lies_beside_the_adapter(adapter, tmp_path):
    """Guards against a mask in a folder from which no adapter can be loaded."""
    if "." in adapter:
        with pytest.raises((ValueError, KeyError)):
            masked(adapter)
        return
    model = masked(adapter)
    model.save_pretrained(tmp_path)
    folder = tmp_path if adapter == "default" else tmp_path / adapter
    files = {name for name in files_of(tmp_path) if os.path.basename(name) in MASK_FILES}
    assert files == {os.path.relpath(folder / name, tmp_path) for name in MASK_FILES}
    assert (folder / "adapter_model.safetensors").exists()
    loaded = PeftModel.from_pretrained(
        base_model("lora"), folder, adapter_name=adapter, is_trainable=True
    )
    apply_mask(loaded, FishMask.from_pretrained(folder))
    assert get_mask(loaded) == get_mask(model)
    assert_close(output_of(loaded.eval(), inputs()), output_of(model.eval(), inputs()), "loaded")


@pytest.mark.parametrize("selected", [None, ["default"], ["other"], ["third"]])
def test_only_what_is_saved_is_described(selected, tmp_path):
    """Guards against a mask beside an adapter that has none, or beside no adapter at all."""
    model = masked()
    for name in ("other", "third"):
        model.add_adapter(name, config_of("lora"))
    model.double().set_adapter("other")
    other = random_bits(model, 4)
    apply_mask(model, other)
    model.save_pretrained(tmp_path, selected_adapters=selected)
    expected = {"default": "fish_mask.json", "other": os.path.join("other", "fish_mask.json")}
    saved = {expected[name] for name in selected or expected if name in expected}
    assert {n for n in files_of(tmp_path) if n.endswith("fish_mask.json")} == saved
    if "other" in (selected or expected):
        assert FishMask.from_pretrained(tmp_path / "other") == FishMask(other)


def test_saving_again_without_a_mask(tmp_path):
    """Guards against a folder whose mask is that of what lay there before."""
    masked().save_pretrained(tmp_path)
    plain = seeded(lambda: get_peft_model(base_model("lora"), config_of("lora")), 1)
    plain.save_pretrained(tmp_path / "plain")
    assert not MASK_FILES & files_of(tmp_path / "plain")


def test_an_adapter_of_any_name_resumes(tmp_path):
    """Guards against checkpoints whose mask nobody finds."""
    data = [{"input_ids": row, "labels": torch.tensor(i % 3)} for i, row in enumerate(inputs())]

    def trainer(steps, mask):
        model = get_peft_model(
            tiny_bert(), LoraConfig(target_modules=["query", "value"], **LORA), adapter_name="mine"
        )
        mask = random_bits(model, 2) if mask is None else mask
        arguments = TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=2, report_to="none", use_cpu=True
        )
        arguments.disable_tqdm = True
        return FishTuningTrainer(model=model, args=arguments, train_dataset=data, mask=mask)

    first = trainer(2, None)
    first.train()
    folder = tmp_path / "checkpoint-2" / "mine"
    again = trainer(4, FishMask.from_pretrained(folder))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4
    assert get_mask(again.model) == get_mask(first.model)


# Resuming


def adapted():
    return with_lora(tiny_bert(), target_modules=["query", "value"])


def mask_of(model, seed):
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    scores = random_scores(trainable, seed=seed)
    return create_mask_from_fisher(scores, num_trainable=120, names_to_exclude=["modules_to_save"])


def trainer_of(how, seed, steps, folder):
    model = adapted()
    mask = mask_of(model, seed)
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=1,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = examples_for(model, 8, shortest=6, longest=6)
    settings = {"args": arguments, "train_dataset": data}
    if how == "plain":
        return Trainer(model=apply_mask(model, mask), **settings), mask
    if how == "callback":
        return Trainer(model=model, callbacks=[FishTuningCallback(mask)], **settings), mask
    return FishTuningTrainer(model=model, mask=mask, **settings), mask


@pytest.mark.parametrize("how", ["plain", "callback", "ours"])
def test_resuming_with_another_mask(how, tmp_path):
    """Guards against twice the budget, half of it trained by each of two masks."""
    first, _ = trainer_of(how, 1, 2, tmp_path)
    first.train()
    second, _ = trainer_of(how, 2, 4, tmp_path)
    with pytest.raises(ValueError, match="another mask"):
        second.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("how", ["plain", "callback", "ours"])
def test_resuming_with_the_same_mask(how, tmp_path):
    """Guards against a refusal of what is right, and a run that ends elsewhere."""
    whole, _ = trainer_of(how, 1, 4, tmp_path / "whole")
    whole.train()
    trainer_of(how, 1, 2, tmp_path / "parts")[0].train()
    second, mask = trainer_of(how, 1, 4, tmp_path / "parts")
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 4
    assert get_mask(second.model) == mask
    state = whole.model.state_dict()
    for name, tensor in second.model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=1e-6)


def test_loading_an_adapter_that_was_trained_with_another_mask(tmp_path):
    """Guards a loop of one's own: weights of one mask go into a model that has another."""
    model = masked()
    model.save_pretrained(tmp_path)
    other = seeded(lambda: get_peft_model(base_model("lora"), config_of("lora")), 1).double()
    apply_mask(other, random_bits(other, 5))
    with pytest.raises(ValueError, match="another mask"):
        other.load_adapter(tmp_path, "default", is_trainable=True)


# What is left out


class Deeper(Net):
    def __init__(self):
        super().__init__()
        self.lin2 = nn.Linear(8, 8)

    def forward(self, input_ids):
        return super().forward(input_ids)


def deeper():
    config = LoraConfig(target_modules=["lin0", "lin1", "lin2"], **LORA)
    return seeded(lambda: get_peft_model(Deeper(), config), 1)


def test_a_mask_that_leaves_out_a_layer_is_told(caplog):
    """Guards against a mask of a model with fewer layers, beside which others train whole."""
    bits = {name: b for name, b in random_bits(deeper(), 2).items() if "lin2" not in name}
    with caplog.at_level("WARNING"):
        apply_mask(deeper(), bits)
    (told,) = [record.getMessage() for record in caplog.records]
    assert "leaves out 2 trainable tensors" in told
    assert "lin2" in told


def test_an_optimizer_that_holds_none_of_the_values_is_told(caplog):
    """Guards a plain loop whose optimizer was built before the mask was applied."""
    model = seeded(lambda: get_peft_model(base_model("lora"), config_of("lora")), 1).double()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    apply_mask(model, random_bits(model, 2))
    with caplog.at_level("WARNING"):
        for _ in range(4):
            optimizer.zero_grad()
            model(inputs()).square().mean().backward()
            optimizer.step()
    told = [r for r in caplog.records if "optimizer" in r.getMessage()]
    assert len(told) == 1
