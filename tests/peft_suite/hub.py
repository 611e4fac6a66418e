"""A hub cache of tiny random models under the names that PEFT's tests load, built from configs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import transformers as tr
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_REVISION = "0" * 40
_VOCABULARY = 512

_COMMON: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2, "head_dim": 8}
_EXPERTS = _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}
_OPT = _COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 32}
_GPT = {"vocab_size": _VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128} | {
    key: _COMMON[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")
}
_BART = {"vocab_size": _VOCABULARY, "d_model": 32, "max_position_embeddings": 128} | {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
}
_T5 = {"vocab_size": _VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2}
_T5 |= {"num_heads": 4, "decoder_start_token_id": 0}

# Model class, without "transformers.", its config's settings, and the names it goes by.
_MODELS: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "OPTForCausalLM",
        _OPT,
        [
            "peft-internal-testing/opt-125m",
            "peft-internal-testing/tiny-random-OPTForCausalLM",
        ],
    ),
    (
        "GPT2LMHeadModel",
        _GPT,
        [
            "peft-internal-testing/tiny-random-GPT2LMHeadModel",
            "peft-internal-testing/tiny-random-gpt2",
            "hf-internal-testing/tiny-random-gpt2",
        ],
    ),
    (
        "GPTJForCausalLM",
        _GPT | {"rotary_dim": 4},
        ["peft-internal-testing/tiny-random-GPTJForCausalLM"],
    ),
    (
        "LlamaForCausalLM",
        _GROUPED,
        [
            "trl-internal-testing/tiny-random-LlamaForCausalLM",
            "peft-internal-testing/tiny-random-LlamaForCausalLM",
            "hf-internal-testing/tiny-random-LlamaForCausalLM",
        ],
    ),
    (
        "MistralForCausalLM",
        _GROUPED,
        ["hf-internal-testing/tiny-random-MistralForCausalLM"],
    ),
    ("Qwen2ForCausalLM", _GROUPED, ["peft-internal-testing/tiny-dummy-qwen2"]),
    ("Qwen3ForCausalLM", _GROUPED, ["trl-internal-testing/tiny-Qwen3ForCausalLM"]),
    (
        "Gemma3ForCausalLM",
        _GROUPED | {"tie_word_embeddings": True},
        ["hf-internal-testing/tiny-random-Gemma3ForCausalLM"],
    ),
    ("MixtralForCausalLM", _EXPERTS, ["hf-internal-testing/Mixtral-tiny"]),
    ("GptOssForCausalLM", _EXPERTS, ["trl-internal-testing/tiny-GptOssForCausalLM"]),
    (
        "Qwen3MoeForCausalLM",
        _EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32},
        ["trl-internal-testing/tiny-Qwen3MoeForCausalLM", "hf-internal-testing/tiny-qwen3-moe"],
    ),
    (
        "Llama4ForCausalLM",
        _EXPERTS | {"intermediate_size_mlp": 64},
        ["trl-internal-testing/tiny-Llama4ForCausalLM"],
    ),
    (
        "T5ForConditionalGeneration",
        _T5,
        [
            "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated",
            "peft-internal-testing/tiny-random-T5ForConditionalGeneration",
            "peft-internal-testing/tiny-random-t5",
        ],
    ),
    (
        "BartForConditionalGeneration",
        _BART,
        ["peft-internal-testing/tiny-random-BartForConditionalGeneration"],
    ),
    ("BertModel", _COMMON, ["peft-internal-testing/tiny-random-BertModel"]),
    ("RobertaModel", _COMMON, ["peft-internal-testing/tiny-random-RobertaModel"]),
    ("DebertaModel", _COMMON, ["peft-internal-testing/tiny-random-DebertaModel"]),
    ("DebertaV2Model", _COMMON, ["peft-internal-testing/tiny-random-DebertaV2Model"]),
    (
        "BertForSequenceClassification",
        _COMMON,
        ["peft-internal-testing/tiny-random-BertForSequenceClassification"],
    ),
    (
        "RobertaForSequenceClassification",
        _COMMON,
        ["peft-internal-testing/tiny-random-RobertaForSequenceClassification"],
    ),
    (
        "LlamaForSequenceClassification",
        _GROUPED,
        ["trl-internal-testing/tiny-LlamaForSequenceClassification-3.2"],
    ),
]


def build_hub(folder: Path) -> None:
    """Writes the models into `folder/hub`, as a download would have left them there.

    Args:
        folder: What `HF_HOME` will name.
    """
    tr.utils.logging.disable_progress_bar()
    for kind, settings, names in _MODELS:
        model_class = getattr(tr, kind)
        torch.manual_seed(0)
        try:
            model = model_class(model_class.config_class(**settings))
        except Exception:
            logging.exception("%s cannot be built with this transformers", kind)
            continue
        for name in names:
            repository = folder / "hub" / f"models--{name.replace('/', '--')}"
            snapshot = repository / "snapshots" / _REVISION
            model.save_pretrained(snapshot)
            _tokenizer().save_pretrained(snapshot)
            (repository / "refs").mkdir(parents=True, exist_ok=True)
            (repository / "refs" / "main").write_text(_REVISION)


def _tokenizer() -> tr.PreTrainedTokenizerFast:
    """One token per byte, after the three special ones."""
    special = ["<s>", "<pad>", "</s>"]
    vocabulary = {token: i for i, token in enumerate(special)}
    for character in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tr.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>"
    )
