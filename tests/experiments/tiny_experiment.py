"""A tiny model with a tokenizer, a small CSV, and an experiment on them."""

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
)

from fish_tuning.experiments.config.schema import ExperimentConfig
from fish_tuning.experiments.config.yaml_file import merge

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
ALL_ARMS = [
    "Original LoRA",
    "LoRA-FISH",
    "LoRA-FISH-rand",
    "LoRA-FISH-rev",
    "LoRA (FISH rank)",
    "LoRA-FA",
]


def write_tokenizer(folder: Path, **special: str) -> Path:
    """A word-level tokenizer with [CLS] and [SEP] around the text; its special tokens as given."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokens = special or {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **tokens)
    fast.save_pretrained(folder)
    return folder


def write_bert(folder: Path, **config: Any) -> Path:
    """A BERT of two layers, without a head, and its tokenizer."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 40, "vocab_size": 44}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = BertConfig(**{**sizes, "pad_token_id": 0, "initializer_range": 0.2, **config})
        BertModel(settings).save_pretrained(folder)
    return write_tokenizer(folder)


def write_llama(folder: Path, **special: str) -> Path:
    """A decoder of two layers whose tokenizer has no pad token."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 40, "vocab_size": 44}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaModel(LlamaConfig(**sizes, num_key_value_heads=1)).save_pretrained(folder)
    return write_tokenizer(folder, **(special or {"eos_token": "[SEP]"}))


def write_data(path: Path, rows: int = 120, label: str = "class") -> Path:
    """Sentences of random words; the label is whether their numbers are large, or how large."""
    draw = random.Random(0)
    lines = ["text,label"]
    for _ in range(rows):
        numbers = [draw.randrange(40) for _ in range(draw.randrange(3, 9))]
        mean = sum(numbers) / len(numbers)
        value = f"{mean / 40:.3f}" if label == "float" else str(int(mean > 19.5))
        lines.append(f"{' '.join(f'w{n}' for n in numbers)},{value}")
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def experiment(*paths: Path | str, **changes: Any) -> ExperimentConfig:
    """Return an experiment of a dozen steps.

    Args:
        paths: The model's folder, the data file and the output folder.
        changes: Sections as in a YAML file; they win over those given here.
    """
    model, data, output_dir = paths
    sections: dict[str, Any] = {
        "model": {"name": str(model)},
        "dataset": {"path": str(data)},
        "lora": {"baseline_rank": 2, "fish_rank": 8, "target_modules": ["query", "key", "value"]},
        "training": {
            "max_seq_length": 16,
            "output_dir": str(output_dir),
            "args_override": {
                "max_steps": 12,
                "per_device_train_batch_size": 8,
                "eval_strategy": "steps",
                "save_strategy": "steps",
                "eval_steps": 4,
                "save_steps": 4,
                "logging_steps": 3,
                "learning_rate": 1e-2,
            },
        },
        "fish_tuning": {"num_samples": 16},
        "seeds": [1],
    }
    return ExperimentConfig.model_validate(merge(sections, changes))
