"""Pretrain a small decoder on the documentation of installed packages, with nothing to download.

The second architecture of the studies: `python scripts/pretrain_decoder.py results/decoder`, then
`fish-tuning run configs/studies/decoder.yaml`. Some ten minutes on two cores. The text, and so the
model, depends on the installed versions.
"""

import argparse
import inspect
import itertools
import logging
from pathlib import Path
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from fish_tuning.experiments.data.installed.text import DEFAULT_PACKAGES, docstrings

logger = logging.getLogger(__name__)

VOCABULARY = 8192
BLOCK = 128
END = "<|end|>"


def main() -> None:
    """Train tokenizer and model, and save both."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the model goes")
    parser.add_argument("--steps", type=int, default=1500, help="of 16 blocks of 128 tokens")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    set_seed(options.seed)

    texts = [inspect.cleandoc(text) for name in DEFAULT_PACKAGES for text in docstrings(name)]
    tokenizer = trained_tokenizer(texts)
    blocks = blocks_of(texts, tokenizer)
    logger.info("%d docstrings, %d blocks of %d tokens", len(texts), len(blocks), BLOCK)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    args = TrainingArguments(
        output_dir=str(options.folder / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=16,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.1,
        bf16=True,
        use_cpu=True,
        save_strategy="no",
        logging_steps=50,
        report_to="none",
        seed=options.seed,
    )
    Trainer(
        model=model, args=args, train_dataset=blocks, data_collator=default_data_collator
    ).train()
    model.save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)


def trained_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    build: Any = PreTrainedTokenizerFast  # untyped
    fast: PreTrainedTokenizerFast = build(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    return fast


def blocks_of(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """The texts one after the other, cut into blocks; labels are the tokens themselves."""
    end = tokenizer.eos_token_id
    tokens = list(itertools.chain.from_iterable([*ids, end] for ids in tokenizer(texts).input_ids))
    blocks = [tokens[i : i + BLOCK] for i in range(0, len(tokens) - BLOCK + 1, BLOCK)]
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


if __name__ == "__main__":
    main()
