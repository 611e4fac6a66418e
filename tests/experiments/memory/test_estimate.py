"""Estimates of memory, beside what training and scoring take."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
)

from benchmarks.measure import peak_memory
from benchmarks.training_memory import bytes_held
from fish_tuning import calculate_fisher_information, create_mask_from_fisher
from fish_tuning.experiments.arms import planned
from fish_tuning.experiments.config.devices import Devices
from fish_tuning.experiments.config.load import load_config
from fish_tuning.experiments.memory.estimate import estimate_memory
from fish_tuning.experiments.models.adapters import add_adapter, trainable_tensors
from fish_tuning.experiments.models.checkpointing import enable_checkpointing
from fish_tuning.experiments.models.counts import count_parameters
from fish_tuning.experiments.runs.arguments import training_arguments
from fish_tuning.experiments.runs.trainers import build_trainer
from fish_tuning.selection.criteria import random_scores

SHAPE = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 2000}
LLAMA = SHAPE | {"model_type": "llama", "intermediate_size": 384, "num_key_value_heads": 2}
BERT = SHAPE | {"model_type": "bert", "intermediate_size": 512}
GPT2 = {"model_type": "gpt2", "n_embd": 128, "n_layer": 4, "n_head": 4, "vocab_size": 2000}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
# Its decoder flattens the examples of a batch, which are then scored one by one.
OPT = SHAPE | {"model_type": "opt", "ffn_dim": 512, "word_embed_proj_dim": 128}
ROWS, LENGTH = 8, 64


def experiment(folder, architecture, args="", *, own=False):
    (folder / "config.json").write_text(json.dumps(architecture))
    generative = architecture["model_type"] != "bert"
    task = "task: causal_lm, path: d.txt" if generative else "load_args: [imdb], num_labels: 2"
    variants = ", variants: [{name: own, own_weights: all-linear}]" if own else ""
    (folder / "e.yaml").write_text(f"""
model: {{name: {folder}}}
dataset: {{{task}}}
lora: {{baseline_rank: 4, fish_rank: 8, target_modules: all-linear}}
fish_tuning: {{methods_to_run: [Original LoRA, LoRA-FISH]{variants}}}
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
    enable_checkpointing(model, config.training_args)
    return model


def examples(num_labels):
    """Two batches, each with one row that is padded."""
    lengths = [LENGTH] * (ROWS - 1) + [LENGTH - 1]
    ids = [torch.randint(1, 2000, (n,)).tolist() for n in 2 * lengths]
    return [{"input_ids": i, "labels": 0 if num_labels else i} for i in ids]


def batch_for(num_labels):
    ids = torch.randint(1, 2000, (ROWS, LENGTH))
    labels = torch.zeros(ROWS, dtype=torch.long) if num_labels else ids
    return {"input_ids": ids, "labels": labels}


CASES = [
    (LLAMA, "", False),
    (LLAMA, "", True),
    (BERT, "", False),
]
SLOW_CASES = [
    (LLAMA, ", gradient_checkpointing: true", False),
    (LLAMA, ", bf16: true", False),
    (LLAMA, ", gradient_accumulation_steps: 2", False),
    (LLAMA, ", label_smoothing_factor: 0.1", False),
    (LLAMA, ", padding_free: true", False),
    (LLAMA | {"vocab_size": 40_000}, "", False),
    (BERT, "", True),
    (GPT2, "", False),
    (OPT, "", False),
]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES]


class Tokenizer(PreTrainedTokenizerFast):
    """Pads ids."""

    def __init__(self):
        words = tokenizers.models.WordLevel({"[PAD]": 0}, unk_token="[PAD]")
        super().__init__(
            tokenizer_object=tokenizers.Tokenizer(words), pad_token="[PAD]", eos_token="[PAD]"
        )


def trainer_of(model, config, num_labels, folder, mask):
    """The Trainer that `fish-tuning run` would train the model with."""
    changes = {"max_steps": 2, "eval_strategy": "no", "save_strategy": "no"}
    changes |= {"load_best_model_at_end": False, "use_cpu": True}
    tokenizer = Tokenizer()
    prepared = SimpleNamespace(
        config=config,
        train=Dataset.from_list(examples(num_labels)),
        validation=None,
        tokenizer=tokenizer,
        collate=DataCollatorWithPadding(tokenizer),
        data=SimpleNamespace(metrics=["loss"]),
    )
    return build_trainer(
        model, prepared, training_arguments(config, folder, 0, **changes), mask, []
    )


def measured(model, run):
    return bytes_held(model) + peak_memory(run, "cpu")


@pytest.mark.parametrize(("architecture", "args", "own"), CASES)
def test_estimates_beside_measured_peaks(tmp_path, architecture, args, own):
    """Guards the memory that a plan names, of arms with and without a mask."""
    config, num_labels = experiment(tmp_path, architecture, args, own=own)
    counts = count_parameters(config, num_labels)
    estimates = estimate_memory(config, counts, num_labels, Devices())
    for arm in planned(config):
        model, mask = adapted(config, arm, tmp_path, num_labels), None
        if arm.criterion is not None:
            score = partial(
                calculate_fisher_information, model, [batch_for(num_labels)], progress=False
            )
            estimate = estimates[arm.key].scoring.total
            # The failed attempt at a whole example is garbage that Python frees when it likes.
            one_by_one = architecture["model_type"] == "opt"
            assert estimate == pytest.approx(
                measured(model, score), rel=0.2 if one_by_one else 0.05
            )
            scores = random_scores(trainable_tensors(model), 0)
            mask = create_mask_from_fisher(scores, num_trainable=counts[arm.key].trainable)
        trainer = trainer_of(model, config, num_labels, tmp_path, mask)
        estimate = estimates[arm.key].training.total
        assert estimate == pytest.approx(measured(model, trainer.train), rel=0.05)


@pytest.mark.slow
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


def test_what_optimizers_keep(tmp_path):
    """Guards against AdamW's numbers where another optimizer trains."""
    for name, numbers in {"adamw_torch": 2, "sgd": 0}.items():
        config, num_labels = experiment(tmp_path, BERT, f", optim: {name}")
        counts = count_parameters(config, num_labels)
        found = estimate_memory(config, counts, num_labels, Devices())
        for key, memory in found.items():
            assert memory.training.optimizer == 4 * numbers * counts[key].trainable
