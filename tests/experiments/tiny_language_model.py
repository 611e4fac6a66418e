"""A tiny language model with a tokenizer and a chat template, its data, and an experiment."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fish_tuning.experiments.config.schema import ExperimentConfig
from fish_tuning.experiments.config.yaml_file import merge
from tests.experiments.tiny_experiment import experiment

WORDS = [f"w{i}" for i in range(40)]
SPECIAL = ["<pad>", "<unk>", "<end>", "<system>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for m in messages %}{{ ' <' + m['role'] + '> ' + m['content'] + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <assistant> ' }}{% endif %}"
)


def language_model(folder: Path, **config: Any) -> Path:
    """A Llama of two layers whose tokenizer knows forty words and the end of a text."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS, "####", *map(str, range(9))])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>", pad_token="<pad>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 64, "num_key_value_heads": 1}
    ends = {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = LlamaConfig(
            **{**sizes, **ends, "vocab_size": len(vocabulary), "initializer_range": 0.3, **config}
        )
        LlamaForCausalLM(settings).save_pretrained(folder)
    return folder


def write_pairs(path: Path, rows: int = 60) -> Path:
    """Prompts of a few words; the completion repeats the last one and answers with a digit."""
    draw = random.Random(0)
    lines = []
    for _ in range(rows):
        words = [f"w{draw.randrange(40)}" for _ in range(draw.randrange(2, 7))]
        answer = f"{words[-1]} #### {int(words[-1][1:]) % 9}"
        lines.append({"prompt": f"{' '.join(words)} ", "completion": f"{answer} <end>"})
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return path


def generative(
    model: Path, data: Path | str, output_dir: Path, /, **changes: Any
) -> ExperimentConfig:
    """An experiment of a dozen steps with a language model; `changes` as in a YAML file."""
    sections = {
        "dataset": {"task": "causal_lm"},
        "lora": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        "training": {"max_seq_length": 24, "args_override": {"learning_rate": 2e-2}},
    }
    return experiment(model, data, output_dir, **merge(sections, changes))
