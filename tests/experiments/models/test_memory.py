"""Estimates of memory, beside what training and scoring take."""

import json
from functools import partial

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.measure import peak_memory
from benchmarks.training_memory import bytes_held
from fish_tuning import apply_mask, calculate_fisher_information, create_mask_from_fisher
from fish_tuning.experiments.arms import planned
from fish_tuning.experiments.config.devices import Devices
from fish_tuning.experiments.config.load import load_config
from fish_tuning.experiments.models.adapters import add_adapter, trainable_tensors
from fish_tuning.experiments.models.counts import count_parameters
from fish_tuning.experiments.models.memory import estimate_memory
from fish_tuning.selection.criteria import random_scores

SHAPE = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 2000}
LLAMA = SHAPE | {"model_type": "llama", "intermediate_size": 384, "num_key_value_heads": 2}
BERT = SHAPE | {"model_type": "bert", "intermediate_size": 512}
GPT2 = {"model_type": "gpt2", "n_embd": 128, "n_layer": 4, "n_head": 4, "vocab_size": 2000}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
ROWS, LENGTH = 8, 64


def experiment(folder, architecture, args=""):
    (folder / "config.json").write_text(json.dumps(architecture))
    generative = architecture["model_type"] != "bert"
    task = "task: causal_lm, path: d.txt" if generative else "load_args: [imdb], num_labels: 2"
    (folder / "e.yaml").write_text(f"""
model: {{name: {folder}}}
dataset: {{{task}}}
lora: {{baseline_rank: 4, fish_rank: 8, target_modules: all-linear}}
fish_tuning: {{methods_to_run: [Original LoRA, LoRA-FISH]}}
training:
  max_seq_length: {LENGTH}
  args_override: {{per_device_train_batch_size: {ROWS}{args}}}
""")
    return load_config(folder / "e.yaml"), 0 if generative else 2


def adapted(config, arm, folder, num_labels):
    torch.manual_seed(0)
    own = AutoConfig.from_pretrained(folder, num_labels=num_labels or 2)
    family = AutoModelForSequenceClassification if num_labels else AutoModelForCausalLM
    model = add_adapter(family.from_config(own), arm, config)
    if config.training_args.get("gradient_checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def batch_for(num_labels):
    ids = torch.randint(1, 2000, (ROWS, LENGTH))
    labels = torch.zeros(ROWS, dtype=torch.long) if num_labels else ids
    return {"input_ids": ids, "labels": labels}


CASES = [
    (LLAMA, ""),
    (LLAMA, ", gradient_checkpointing: true"),
    (LLAMA, ", bf16: true"),
    (BERT, ""),
    (GPT2, ""),
]


def train(model, num_labels, dtype):
    optimizer = torch.optim.AdamW(trainable_tensors(model).values(), fused=True)
    for _ in range(2):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = model(**batch_for(num_labels)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def measured(model, run):
    return bytes_held(model) + peak_memory(run, "cpu")


@pytest.mark.parametrize(("architecture", "args"), CASES)
def test_estimates_beside_measured_peaks(tmp_path, architecture, args):
    """Guards the memory that a plan names, of arms with and without a mask."""
    config, num_labels = experiment(tmp_path, architecture, args)
    counts = count_parameters(config, num_labels)
    estimates = estimate_memory(config, counts, num_labels, Devices())
    dtype = torch.bfloat16 if "bf16" in args else None
    for arm in planned(config):
        model = adapted(config, arm, tmp_path, num_labels)
        if arm.criterion is not None:
            score = partial(
                calculate_fisher_information, model, [batch_for(num_labels)], progress=False
            )
            estimate = estimates[arm.key].scoring.total
            assert estimate == pytest.approx(measured(model, score), rel=0.15)
            scores = random_scores(trainable_tensors(model), 0)
            k = counts[arm.key].trainable
            apply_mask(model, create_mask_from_fisher(scores, num_trainable=k))
        estimate = estimates[arm.key].training.total
        assert estimate == pytest.approx(
            measured(model, partial(train, model, num_labels, dtype)), rel=0.05
        )


def test_engines_divide_what_they_divide(tmp_path):
    """Guards the parts of a model that are divided among devices, and those that are not."""
    config, num_labels = experiment(tmp_path, LLAMA)
    counts = count_parameters(config, num_labels)

    def of(count, engine):
        found = estimate_memory(config, counts, num_labels, Devices(count, engine))
        return [found[arm.key].training for arm in planned(config)]

    alone, ddp, zero2, fsdp2 = of(1, "ddp"), of(4, "ddp"), of(4, "zero2"), of(4, "fsdp2")
    for k, one, copied, divided, sharded in zip(
        [count.trainable for count in counts.values()], alone, ddp, zero2, fsdp2, strict=True
    ):
        assert copied.total - one.total == 4 * k
        assert one.optimizer == 8 * k
        assert divided.optimizer == sharded.optimizer == 2 * k
        assert divided.weights == one.weights
        assert sharded.weights < one.weights
        assert one.trained - sharded.trained == 3 * k
