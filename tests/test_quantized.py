"""LoRA on weights that bitsandbytes has quantized to 4 or 8 bits, on a processor."""

import functools

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments

from fish_tuning import (
    FishTuningTrainer,
    calculate_fisher_information,
    create_mask_from_fisher,
)
from tests.methods_table import bert_in_4_bits, bert_in_8_bits, quantized
from tests.models import assert_scores_close, batches_of, examples_for, naive_scores, pad, with_lora
from tests.rounding import float32_rtol

bnb = pytest.importorskip("bitsandbytes")

BUILDS = [bert_in_4_bits, bert_in_8_bits]
KINDS = {bert_in_4_bits: bnb.nn.Linear4bit, bert_in_8_bits: bnb.nn.Linear8bitLt}


def adapted(build):
    """LoRA on all linear layers, B not 0, no dropout; the same at every call."""
    model = with_lora(build(), init_lora_weights=False, lora_dropout=0.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def quantized_state(model, kind):
    """Bits and scales of all quantized layers, without what evaluation derives from them."""
    keys = ("weight", "SCB")
    return {
        f"{path}.{key}": value.clone()
        for path, layer in model.named_modules()
        if isinstance(layer, kind)
        for key, value in layer.state_dict().items()
        if key.startswith(keys) and isinstance(value, torch.Tensor)
    }


@torch.no_grad()
def logits(model, batch):
    return model.eval()(**batch).logits


@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("size", [1, 4])
def test_scores_equal_the_loop_in_one_pass(build, size, caplog):
    """Guards rules that do not find the LoRA layers around a quantized one."""
    model = adapted(build)
    layers = [m.get_base_layer() for m in model.modules() if hasattr(m, "lora_A")]
    assert layers and all(type(layer) is KINDS[build] for layer in layers)
    examples = examples_for(model, 6)
    scores = calculate_fisher_information(model, batches_of(examples, size), progress=False)
    naive = functools.partial(naive_scores, model, examples)
    expected = naive()
    assert_scores_close(scores, expected, float32_rtol(model, naive, expected))
    assert "one example at a time" not in caplog.text


def test_outliers_of_a_batch():
    """Guards the rules where 8-bit layers mix examples: a column with an outlier in one of them is
    multiplied in float16 for all. The gradients are then those of the example in its batch."""
    model = adapted(lambda: quantized(load_in_8bit=True, llm_int8_threshold=1.0))
    examples = examples_for(model, 6, shortest=5, longest=5)
    batches = batches_of(examples, 3)
    scores = calculate_fisher_information(model, batches, progress=False)

    def in_batches():
        parameters = trainable(model)
        sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for batch in batches:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            losses = nn.functional.cross_entropy(
                model(**inputs).logits, batch["labels"], reduction="none"
            )
            for loss in losses:
                gradients = torch.autograd.grad(loss, [*parameters.values()], retain_graph=True)
                for name, gradient in zip(sums, gradients, strict=True):
                    sums[name] += gradient**2 / len(examples)
        return sums

    expected = in_batches()
    assert_scores_close(scores, expected, float32_rtol(model, in_batches, expected))
    alone = naive_scores(model, examples)
    assert any(not torch.allclose(scores[name], alone[name], rtol=1e-3) for name in alone)


@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)
def test_training_keeps_what_is_quantized(build, tmp_path):
    """Guards quantized weights and frozen entries against everything that the Trainer does, and
    the files and the merging of what it has trained."""
    model = adapted(build)
    examples = examples_for(model, 8, shortest=6, longest=6)
    scores = calculate_fisher_information(model, batches_of(examples, 4), progress=False)
    mask = create_mask_from_fisher(scores, num_trainable=300)
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    bits = quantized_state(model, KINDS[build])
    trainer = FishTuningTrainer(
        model=model,
        args=TrainingArguments(
            str(tmp_path / "output"),
            max_steps=4,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="no",
            learning_rate=0.01,
            weight_decay=0.1,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=examples,
        eval_dataset=examples,
        data_collator=pad,
        mask=mask,
    )
    assert sum(p.numel() for p in trainable(model).values()) == 300
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    state = model.state_dict()
    changed = 0
    for name, selected in mask.items():
        assert torch.equal(state[name][~selected], before[name][~selected]), name
        changed += int((state[name] != before[name])[selected].sum())
    assert changed > 0.9 * 300
    after = quantized_state(model, KINDS[build])
    assert bits and bits.keys() == after.keys()
    assert all(torch.equal(bits[key], after[key]) for key in bits)

    batch = pad(examples)
    loaded = PeftModel.from_pretrained(build(), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch))
    # Merging quantizes again, so the outputs change; a mask does not change how.
    merged, plain = model.merge_and_unload(), loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, batch), logits(plain, batch), rtol=0, atol=0)


@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)
def test_evaluation_leaves_gradients_alone(build):
    """Guards 4-bit layers on a processor that are repacked, when first evaluated, into a form
    through which no gradient passes."""
    model = adapted(build)
    batch = pad(examples_for(model, 4))

    def gradients(model):
        model.train().zero_grad()
        model(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in trainable(model).items()}

    expected = gradients(model)
    logits(model, batch)
    found = gradients(model)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
