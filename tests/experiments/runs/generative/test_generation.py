"""Texts generated in batches are those that a model generates from each prompt alone."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from fish_tuning.experiments.config.generation import GenerationConfig
from fish_tuning.experiments.config.model import ModelConfig
from fish_tuning.experiments.data.prompts import prompts_of
from fish_tuning.experiments.models.load import load_model, load_tokenizer
from fish_tuning.experiments.runs.generative.generation import generate_texts, write_generations
from tests.experiments.tiny_language_model import language_model


@pytest.fixture(scope="module")
def trainer_and_prompts(tmp_path_factory):
    """A Trainer of a tiny language model, and prompts of several lengths."""
    folder = tmp_path_factory.mktemp("model")
    config = ModelConfig(name=str(language_model(folder)))
    tokenizer = load_tokenizer(config)
    args = TrainingArguments(str(folder / "out"), use_cpu=True, report_to="none")
    trainer = Trainer(load_model(config, tokenizer, 0), args, processing_class=tokenizer)
    texts = ["w1 w2", "w3", "w4 w5 w6 w7 w8", "w9 w3 w1", "w2 w2 w2 w2 w2 w2 w2"]
    data = Dataset.from_dict({"prompt": texts, "completion": ["w0"] * len(texts)})
    return trainer, prompts_of(data, tokenizer)


@pytest.fixture
def with_penalties(trainer_and_prompts):
    """The model comes with settings of its own for generation, as many published ones do."""
    own = trainer_and_prompts[0].model.generation_config
    own.update(repetition_penalty=3.0, no_repeat_ngram_size=1)
    yield
    own.update(repetition_penalty=1.0, no_repeat_ngram_size=0)


@pytest.mark.usefixtures("with_penalties")
def test_penalties_of_the_model_do_not_count(trainer_and_prompts):
    """Guards against penalties on the tokens of prompts and padding."""
    trainer, prompts = trainer_and_prompts
    texts = generate_texts(trainer, prompts, GenerationConfig(max_new_tokens=12, batch_size=5))
    plain = trainer.model.generation_config
    plain.update(repetition_penalty=1.0, no_repeat_ngram_size=0)
    assert texts == generate_texts(trainer, prompts, GenerationConfig(max_new_tokens=12))


@pytest.mark.parametrize("beams", [1, 2])
def test_batches_generate_what_single_prompts_do(trainer_and_prompts, beams):
    """Guards padding on the left, positions, the order of texts and the end of sequence."""
    trainer, prompts = trainer_and_prompts
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt.input_ids])
        generated = trainer.model.generate(
            ids, max_new_tokens=12, do_sample=False, num_beams=beams, pad_token_id=0
        )
        tokens = generated[0, ids.shape[1] :]
        expected.append(trainer.processing_class.decode(tokens, skip_special_tokens=True))
    for size in (1, 2, 5):
        config = GenerationConfig(max_new_tokens=12, num_beams=beams, batch_size=size)
        assert generate_texts(trainer, prompts, config) == expected
    assert len(set(expected)) > 1


def test_texts_are_kept(trainer_and_prompts, tmp_path):
    """Guards the file from which others recompute the metrics."""
    _, prompts = trainer_and_prompts
    file = write_generations(prompts[:2], ["a", "b\n€"], tmp_path)
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert rows[1] == {"prompt": "w3", "references": ["w0"], "generated": "b\n€"}
