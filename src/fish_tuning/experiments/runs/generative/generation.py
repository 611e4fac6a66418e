"""Texts that a model generates from prompts, in batches, and the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig as Settings
from transformers import PreTrainedTokenizerBase, Trainer

from fish_tuning.atomic import write_atomically
from fish_tuning.experiments.config.generation import GenerationConfig
from fish_tuning.experiments.data.prompts import Prompt
from fish_tuning.experiments.runs import processes

GENERATIONS_FILE = "generations.jsonl"


def generate_texts(
    trainer: Trainer, prompts: Sequence[Prompt], config: GenerationConfig
) -> list[str]:
    """Generate a text from each prompt, without sampling.

    Prompts are padded on the left and batched by length, longest first; the texts do not depend on
    the batches. Several processes share the prompts.

    Args:
        trainer: The Trainer, whose model generates, in the Trainer's precision.
        prompts: The prompts.
        config: How to generate.

    Returns:
        The texts in the order of the prompts, up to the end of sequence and without special tokens.
    """
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place].input_ids))
    own = order[processes.rank() :: processes.count()]
    size = config.batch_size or trainer.args.per_device_eval_batch_size
    texts: dict[int, str] = {}
    for start in range(0, len(own), size):
        places = own[start : start + size]
        batch = [prompts[place] for place in places]
        texts |= zip(places, _generate_batch(trainer, batch, config), strict=True)
    parts = processes.gather(texts)
    texts = {place: text for part in parts for place, text in part.items()}
    return [texts[place] for place in range(len(prompts))]


def _generate_batch(
    trainer: Trainer, prompts: Sequence[Prompt], config: GenerationConfig
) -> list[str]:
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    tokenizer: Any = trainer.processing_class
    longest = max(len(prompt.input_ids) for prompt in prompts)
    padding = [longest - len(prompt.input_ids) for prompt in prompts]
    ids = [
        [tokenizer.pad_token_id] * pad + list(prompt.input_ids)
        for pad, prompt in zip(padding, prompts, strict=True)
    ]
    mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), trainer.accelerator.autocast():
            generated = model.generate(
                input_ids=torch.tensor(ids, device=trainer.args.device),
                attention_mask=torch.tensor(mask, device=trainer.args.device),
                generation_config=_settings(model, tokenizer, config),
            )
    finally:
        model.train(was_training)
    texts: list[str] = tokenizer.batch_decode(generated[:, longest:], skip_special_tokens=True)
    return texts


def _settings(model: Any, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig) -> Settings:
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    settings: Any = Settings
    made: Settings = settings(
        max_new_tokens=config.max_new_tokens,
        num_beams=config.num_beams,
        do_sample=False,
        # Some models come with penalties, which would count the padding too.
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None}),
    )
    return made


def write_generations(prompts: Sequence[Prompt], texts: Sequence[str], folder: Path) -> Path:
    """Write prompts, references and generated texts as JSON lines into a run's folder."""
    lines = [
        json.dumps(
            {"prompt": prompt.text, "references": prompt.references, "generated": text},
            ensure_ascii=False,
        )
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    file = folder / GENERATIONS_FILE
    content = "".join(f"{line}\n" for line in lines)
    write_atomically(file, content.encode("utf-8", errors="replace"))
    return file
