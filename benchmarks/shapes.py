"""Models and batches of known shapes, built from configs: weights do not change speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """A model of known size, and the modules that adapters go to."""

    name: str
    model: Callable[[], Any]
    targets: tuple[str, ...]
    dtype: torch.dtype = torch.float32
    task: str = "SEQ_CLS"

    def build(self, device: str) -> Any:
        """The model with random weights, in training mode."""
        torch.manual_seed(0)
        with torch.device(device):
            model = self.model()
        return model.to(self.dtype).train()


def _bert(**sizes: Any) -> Callable[[], Any]:
    settings: dict[str, Any] = {"num_labels": 2, **sizes}
    config = transformers.BertConfig(**settings)
    return lambda: transformers.BertForSequenceClassification(config)


def _llama(**sizes: Any) -> Callable[[], Any]:
    settings: dict[str, Any] = {"num_labels": 2, "pad_token_id": 0, "use_cache": False, **sizes}
    config = transformers.LlamaConfig(**settings)
    build: Any = transformers.LlamaForSequenceClassification  # untyped
    return lambda: build(config)


def _causal(**sizes: Any) -> Callable[[], Any]:
    config = transformers.LlamaConfig(pad_token_id=0, use_cache=False, **sizes)
    build: Any = transformers.LlamaForCausalLM  # untyped
    return lambda: build(config)


_QKV = ("query", "key", "value")
_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_LINEAR = (*_QKVO, "gate_proj", "up_proj", "down_proj")
_TEXT = "CAUSAL_LM"

MINILM = Shape(
    "MiniLM-L6",
    _bert(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
    _QKV,
)
BERT_BASE = Shape("BERT-base", _bert(), _QKV)
_TINYLLAMA: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
TINYLLAMA = Shape("TinyLlama-1.1B", _llama(**_TINYLLAMA), _QKVO, torch.bfloat16)
TINY = Shape(
    "tiny BERT",
    _bert(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=500,
    ),
    _QKV,
)

_SMOLLM2: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
SMOLLM2 = Shape("SmolLM2-135M", _causal(**_SMOLLM2), _LINEAR, task=_TEXT)
_SMALL_CAUSAL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LARGE_VOCABULARY = Shape(
    "small Llama with a vocabulary of 128,256",
    _causal(vocab_size=128256, **_SMALL_CAUSAL),
    _LINEAR,
    task=_TEXT,
)
TINY_CAUSAL = Shape("tiny Llama", _causal(vocab_size=500, **_SMALL_CAUSAL), _LINEAR, task=_TEXT)
TINYLLAMA_LAYER = Shape(
    "one layer of TinyLlama-1.1B in bfloat16",
    _causal(vocab_size=500, **{**_TINYLLAMA, "num_hidden_layers": 1}),
    _LINEAR,
    torch.bfloat16,
    _TEXT,
)


def batch_of(examples: int, tokens: int, device: str, seed: int = 0) -> Batch:
    """A batch without padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 500, (examples, tokens), generator=generator)
    labels = torch.randint(0, 2, (examples,), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return {key: value.to(device) for key, value in batch.items()}


def sentences(examples: int, size: int, device: str) -> list[Batch]:
    """Batches of sentences of 5 to 55 tokens, padded to the longest of their batch."""
    batches = []
    for first in range(0, examples, size):
        batch = batch_of(min(size, examples - first), 55, device, seed=first)
        generator = torch.Generator().manual_seed(first)
        lengths = torch.randint(5, 56, (len(batch["labels"]), 1), generator=generator).to(device)
        longest = int(lengths.max())
        real = torch.arange(longest, device=device) < lengths
        batch["input_ids"] = batch["input_ids"][:, :longest] * real
        batch["attention_mask"] = real.long()
        batches.append(batch)
    return batches


def one_by_one(batches: list[Batch]) -> list[Batch]:
    """The same sentences in batches of one, without padding."""
    singles = []
    for batch in batches:
        for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            one = {key: value[i : i + 1] for key, value in batch.items()}
            one["input_ids"] = one["input_ids"][:, :length]
            one["attention_mask"] = one["attention_mask"][:, :length]
            singles.append(one)
    return singles


def texts(examples: int, size: int, tokens: int, device: str) -> list[Batch]:
    """Batches of texts of equal length, whose labels are the texts themselves."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 500, (examples, tokens), generator=generator).to(device)
    return [{"input_ids": part, "labels": part} for part in ids.split(size)]


def padded(text: Batch) -> Batch:
    """The texts cut to lengths from a quarter to all of their tokens, and padded."""
    ids = text["input_ids"]
    rows, tokens = ids.shape
    lengths = torch.linspace(tokens // 4, tokens, rows, device=ids.device).long()[:, None]
    real = torch.arange(tokens, device=ids.device) < lengths
    labels = ids.masked_fill(~real, -100)
    return {"input_ids": ids * real, "attention_mask": real.long(), "labels": labels}


def packed(batch: Batch) -> Batch:
    """The same texts without padding, one after another in one row."""
    real = batch["attention_mask"].bool()
    positions = (batch["attention_mask"].cumsum(1) - 1)[real]
    labels = batch["input_ids"][real].masked_fill(positions == 0, -100)
    row = {"input_ids": batch["input_ids"][real], "position_ids": positions, "labels": labels}
    return {name: values[None] for name, values in row.items()}
