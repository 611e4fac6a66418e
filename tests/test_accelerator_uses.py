"""Trainers, files, quantized and offloaded models on an accelerator; see test_accelerator.py."""

import pytest
import torch
from accelerate import dispatch_model
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from fish_tuning import (
    FishConfig,
    FishMask,
    FishTuningCallback,
    FishTuningTrainer,
    apply_mask,
    create_mask_from_fisher,
    get_mask,
    load_packed,
    mask_trainer,
    pack,
    unpack,
)
from tests import test_device_map
from tests.models import (
    assert_scores_close,
    batches_of,
    examples_for,
    naive_scores,
    pad,
    tiny_bert,
    with_lora,
)
from tests.parallel import error_of, lora_bert, lora_llama, scored
from tests.test_accelerator import (
    DEVICE,
    NO_DROPOUT,
    ON_CPU,
    WIDE,
    assert_frozen,
    assert_same,
    masked_and_dense,
    needs_accelerator,
    on_device,
    on_processor,
    own_weights,
    step,
    train,
)
from tests.test_accelerator import adamw as new_optimizer
from tests.training import (
    KILLED_AT,
    arguments,
    assert_trained_where_selected,
    data_for,
    random_mask,
    tensors_of,
    trainable,
)
from tests.training import lora_bert as bert_with_dropout

pytestmark = pytest.mark.skipif(DEVICE is None, reason="there is no accelerator")
each_precision = pytest.mark.parametrize(
    "precision",
    [{}, {"bf16": True}, pytest.param({"fp16": True}, marks=needs_accelerator)],
    ids=lambda settings: "".join(settings) or "float32",
)
each_kind = pytest.mark.parametrize(
    "build", [lora_bert, lora_llama, own_weights], ids=lambda build: build.__name__
)


def trainer_on_device(model, folder, **options):
    settings = {key: options.pop(key) for key in ("mask", "fish_config") if key in options}
    return FishTuningTrainer(
        model=model,
        args=arguments(folder, **{"use_cpu": ON_CPU, **options}),
        train_dataset=data_for(model),
        **settings,
    )


# Trainers


@each_precision
def test_trainer_trains_what_is_selected(precision, tmp_path):
    """Guards the count, and frozen entries against everything that a Trainer does."""
    model = bert_with_dropout().to(DEVICE)
    mask, before = random_mask(model), tensors_of(model, trainable(model))
    trainer = trainer_on_device(model, tmp_path, mask=mask, **precision)
    assert trainer.args.device.type == torch.device(DEVICE).type
    assert sum(p.numel() for p in trainable(model).values()) == FishMask(mask).num_trainable
    trainer.train()
    assert_trained_where_selected(model, mask, before)


@each_precision
def test_trainer_moves_the_model_itself(precision, tmp_path):
    """Guards a model that is masked on the processor: the Trainer's move changes nothing."""
    moved, left = lora_bert().to(DEVICE), lora_bert()
    mask = random_mask(left)
    for model in (moved, left):
        trainer_on_device(model, tmp_path, mask=mask, **precision).train()
    assert {p.device.type for p in left.parameters()} == {torch.device(DEVICE).type}
    assert_same(left, moved, mask, rtol=1e-6, atol=1e-6)


@each_precision
def test_resumed_run_is_the_undisturbed_one(precision, tmp_path):
    """Guards values, moments, the loss's scale and dropout against a restart."""
    whole, resumed = bert_with_dropout(), bert_with_dropout()
    mask = random_mask(whole)
    settings = {"mask": mask, "save_strategy": "steps", "save_steps": KILLED_AT, **precision}
    trainer_on_device(whole, tmp_path, **settings).train()
    checkpoint = str(tmp_path / f"checkpoint-{KILLED_AT}")
    trainer_on_device(resumed, tmp_path, **settings).train(resume_from_checkpoint=checkpoint)
    assert_same(resumed, whole, mask, rtol=1e-6, atol=1e-6)


def test_mask_trainer_selects_what_a_processor_does(tmp_path):
    """Guards the Trainer's own data and loss on the device."""
    config = FishConfig(num_trainable=200, num_samples=8)
    masks = []
    for use_cpu in (True, ON_CPU):
        model = lora_bert()
        trainer = trainer_on_device(model, tmp_path, fish_config=config, use_cpu=use_cpu)
        masks.append(mask_trainer(trainer, config, progress=False))
        trainer.train()
        assert get_mask(model) == masks[-1]
    ours, theirs = ({name: bits.cpu() for name, bits in mask.items()} for mask in masks)
    # Rounding may swap two neighbours.
    assert sum(int((ours[name] != theirs[name]).sum()) for name in theirs) <= 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_sft_trainer(packing, tmp_path):
    """Guards TRL's batches and its own moves: training is the dense reference's."""
    for package in ("datasets", "trl"):
        pytest.importorskip(package)
    from tests import test_other_trainers as other

    model, twin = other.lora_llama().to(DEVICE), other.lora_llama().to(DEVICE)
    mask, before = random_mask(model), tensors_of(model, trainable(model))
    settings = {"use_cpu": ON_CPU, "packing": packing, "weight_decay": 0.0, "max_steps": 2}
    settings |= {"adam_epsilon": 1e-4, "gradient_checkpointing": False}
    for each, callback in (
        (model, FishTuningCallback(mask)),
        (twin, other.MaskedGradients(on_device(mask))),
    ):
        other.trl_trainer("sft", each, tmp_path, [callback], **settings).train()
    assert_frozen(model, mask, before)
    assert_same(model, twin, mask, rtol=1e-4, atol=1e-5)


# Files


@each_kind
def test_saved_on_the_device_and_trained_further_from_the_file(build, tmp_path):
    """Guards files that only load where they were written."""
    model, _, mask = masked_and_dense(build)
    train(model)
    model.save_pretrained(tmp_path)
    if isinstance(model, PeftModel):
        loaded = PeftModel.from_pretrained(build().unload(), tmp_path, is_trainable=True)
    else:
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    assert_same(loaded, model, mask, rtol=0, atol=0)
    apply_mask(loaded.eval(), FishMask.from_pretrained(tmp_path))
    assert get_mask(loaded) == FishMask(mask)
    train(loaded.to(DEVICE))
    train(model.eval())
    assert_same(loaded, model, mask, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("build", [lora_bert, lora_llama], ids=lambda build: build.__name__)
def test_merged_on_the_device(build):
    """Guards a merge of the tensors as they were before training."""
    model, dense, _ = masked_and_dense(build)
    train(model)
    dense.load_state_dict(model.state_dict())
    batch = on_device(pad(examples_for(model, 4)))
    ours, plain = model.merge_and_unload().eval(), dense.merge_and_unload().eval()
    assert_same(ours, plain, {}, rtol=0, atol=0)
    with torch.no_grad():
        assert torch.equal(ours(**batch).logits, plain(**batch).logits)


def test_generates_what_a_plain_model_does():
    """Guards the cache and generation's own moves, after training."""
    model, dense, _ = masked_and_dense(lora_llama)
    batch = on_device(pad(examples_for(model, 3), side="left"))
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": batch["attention_mask"]}
    untrained = dense.eval().generate(input_ids=batch["input_ids"], **options)
    train(model, steps=range(8))
    dense.load_state_dict(model.state_dict())
    found = model.eval().generate(input_ids=batch["input_ids"], **options)
    expected = dense.generate(input_ids=batch["input_ids"], **options)
    assert torch.equal(found, expected) and not torch.equal(found, untrained)


@pytest.mark.parametrize("created", ["there", "before"])
def test_packed_with_a_seed(created, tmp_path):
    """Guards the start of an adapter that PEFT has made on the device, and the file's bytes."""
    base = tiny_bert(**NO_DROPOUT)
    model = with_lora(base.to(DEVICE) if created == "there" else base, seed=3).to(DEVICE)
    mask = random_mask(model)
    train(apply_mask(model.eval(), mask))
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "packed"
    report = pack(tmp_path / "adapter", file, seed=3, base_model=tiny_bert(**NO_DROPOUT))
    assert report.entries["stored"] == 0 < report.entries["seed"]
    unpack(file, tmp_path / "again", base_model=tiny_bert(**NO_DROPOUT))
    for name in ("adapter_model.safetensors", "fish_mask.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (
            tmp_path / "adapter" / name
        ).read_bytes()
    loaded = load_packed(tiny_bert(**NO_DROPOUT).to(DEVICE), file)
    assert_same(loaded, model, mask, rtol=0, atol=0)


# Memory that does not suffice, quantized and offloaded base models


class Wide(nn.Module):
    """Takes 128 KB per example and operation."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.repeat(1, 4096)
        for _ in range(4):
            wide = wide.sin()
        return wide.view(len(x), 4096, 8).mean(1)


@needs_accelerator
def test_memory_that_runs_out_while_scoring(caplog):
    """Guards the device's own error: batches are halved, and the scores stay the same."""
    model = nn.Sequential(nn.Linear(8, 8), Wide(), nn.Linear(8, 3)).to(DEVICE)
    batches = [{"input": torch.randn(1024, 8), "labels": torch.arange(1024) % 3}]
    expected = scored(model, batches)
    torch.cuda.empty_cache()
    least = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    scored(model, batches)
    limit = least + 0.7 * (torch.cuda.max_memory_allocated() - least)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    try:
        found = scored(model, batches)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_scores_close(on_processor(found), on_processor(expected), 1e-4)
    assert "Memory does not suffice for 1024 examples at a time" in caplog.text


def quantized(folder, bits):
    """BERT whose frozen weights are quantized on the device."""
    tiny_bert(**WIDE, **NO_DROPOUT).save_pretrained(folder)
    settings = {
        4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        # Without outliers, for which an example's scores would depend on its batch.
        8: {"load_in_8bit": True, "llm_int8_threshold": 100.0},
    }
    config = BitsAndBytesConfig(llm_int8_skip_modules=["classifier"], **settings[bits])
    return AutoModelForSequenceClassification.from_pretrained(
        folder, quantization_config=config, device_map=DEVICE
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_base(bits, tmp_path):
    """Guards scores through quantized layers, and their bits against training."""
    bnb = pytest.importorskip("bitsandbytes")
    from tests import test_quantized

    kind = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
    model = test_quantized.adapted(lambda: quantized(tmp_path, bits))
    examples = examples_for(model, 6, shortest=6, longest=6)
    scores = scored(model, batches_of(examples, 3))
    expected = naive_scores(model, [on_device(example) for example in examples])
    rtol = 1e-3 if bits == 4 else 5e-2
    assert_scores_close(on_processor(scores), on_processor(expected), rtol)
    mask = create_mask_from_fisher(scores, num_trainable=300)
    before = tensors_of(model, mask)
    frozen = test_quantized.quantized_state(model, kind)
    apply_mask(model, mask)
    assert sum(p.numel() for p in trainable(model).values()) == 300
    train(model.train())
    assert_frozen(model, mask, before)
    after = test_quantized.quantized_state(model, kind)
    assert frozen and all(torch.equal(after[key], value) for key, value in frozen.items())


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_base_trains_as_a_dense_adapter(bits, tmp_path):
    """Guards the values' gradients through quantized layers."""
    pytest.importorskip("bitsandbytes")
    from tests import test_quantized

    model, dense = (test_quantized.adapted(lambda: quantized(tmp_path, bits)) for _ in range(2))
    mask = random_mask(dense)
    train(apply_mask(model, mask).train())
    train(dense.train(), bits=mask)
    ours, theirs = tensors_of(model, mask), tensors_of(dense, mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def offloaded():
    """BERT whose embeddings and first layer are in the processor's memory until they run."""
    device = 0 if torch.device(DEVICE).type == "cuda" else DEVICE
    places = {f"bert.{part}": device for part in test_device_map.PARTS}
    places |= {"dropout": device, "classifier": device}
    places |= dict.fromkeys(("bert.embeddings", "bert.encoder.layer.0"), "cpu")
    return dispatch_model(test_device_map.base(), places, main_device=device)


@needs_accelerator
def test_offloaded_base():
    """Guards scores and training of an adapter beside layers that come and go."""
    plain = test_device_map.adapted(test_device_map.base()).to(DEVICE)
    model = test_device_map.adapted(offloaded())
    assert any(p.is_meta for p in model.parameters())
    batches = batches_of(examples_for(plain, 6), 2)
    scores, expected = scored(model, batches), scored(plain, batches)
    assert_scores_close(scores, expected, 1e-5)
    mask = create_mask_from_fisher(expected, 0.3)
    for each in (model, plain):
        optimizer = new_optimizer(trainable(apply_mask(each, mask)).values())
        for number in range(3):
            step(each, optimizer, number)
    ours, theirs = tensors_of(model, mask), tensors_of(plain, mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@needs_accelerator
def test_offloaded_adapter_is_refused():
    """Guards against scores of tensors that hold no numbers."""
    model = test_device_map.adapted(offloaded(), layers_to_transform=None)
    error = error_of(scored, model, [])
    assert error is not None and error[0] == "ValueError" and "are offloaded" in error[1]
