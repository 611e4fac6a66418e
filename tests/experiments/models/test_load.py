"""Models and tokenizers as a config names them."""

import importlib.util
import time

import pytest
import torch
from transformers import CONFIG_MAPPING, BertConfig, ViTConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from fish_tuning.experiments.config.model import ModelConfig
from fish_tuning.experiments.errors import ConfigError
from fish_tuning.experiments.models.load import (
    load_model,
    load_tokenizer,
    meta_model,
    quantization_options,
)
from tests.experiments.tiny_experiment import write_bert, write_llama


def test_an_encoder(tmp_path):
    """Guards the head's size, its labels and its loss."""
    config = ModelConfig(name=str(write_bert(tmp_path)))
    tokenizer = load_tokenizer(config, 40)
    model = load_model(config, tokenizer, 3, ("no", "maybe", "yes"))
    assert model.classifier.out_features == 3
    assert model.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert model.config.problem_type == "single_label_classification"
    assert load_model(config, tokenizer, 1, task="regression").config.problem_type == "regression"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_decoder_without_a_pad_token(tmp_path):
    """Guards batches of more than one: the end of sequence pads, and the model knows it."""
    config = ModelConfig(name=str(write_llama(tmp_path)), precision="bf16")
    tokenizer = load_tokenizer(config)
    assert tokenizer.pad_token == tokenizer.eos_token == "[SEP]"
    model = load_model(config, tokenizer, 2)
    assert model.config.pad_token_id == 3
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_an_overridden_pad_token_is_the_tokenizers_too(tmp_path):
    """Guards against a pad token that the model knows and the batches do not have."""
    config = ModelConfig(name=str(write_llama(tmp_path)), config_overrides={"pad_token_id": 0})
    tokenizer = load_tokenizer(config)
    assert tokenizer.pad_token == "[PAD]"
    assert load_model(config, tokenizer, 2).config.pad_token_id == 0


def test_nothing_to_pad_with(tmp_path):
    """Guards tokenizers with neither a pad token nor an end of sequence."""
    config = ModelConfig(name=str(write_llama(tmp_path, bos_token="[CLS]")))
    with pytest.raises(ConfigError, match=r"set model\.config_overrides\.pad_token_id"):
        load_tokenizer(config)
    wrong = config.model_copy(update={"config_overrides": {"pad_token_id": 4711}})
    with pytest.raises(ConfigError, match="4711 is not among the tokenizer's 44 tokens"):
        load_tokenizer(wrong)


def test_config_overrides(tmp_path):
    """Guards overrides: they reach the model, and a mistyped one is refused."""
    name = str(write_bert(tmp_path))
    config = ModelConfig(name=name, config_overrides={"hidden_dropout_prob": 0.25})
    model = load_model(config, load_tokenizer(config), 2)
    assert model.bert.embeddings.dropout.p == 0.25
    wrong = ModelConfig(name=name, config_overrides={"hidden_dropout_prb": 0.25})
    with pytest.raises(ConfigError, match="did you mean 'hidden_dropout_prob'"):
        meta_model(wrong, 2)


@pytest.mark.parametrize("choice", ["eager", "sdpa"])
def test_attention(tmp_path, choice):
    """Guards the choice of attention: it reaches the model that is loaded and the one of shapes."""
    config = ModelConfig(name=str(write_bert(tmp_path)), attn_implementation=choice)
    for model in (load_model(config, load_tokenizer(config), 2), meta_model(config, 2)):
        assert model.config._attn_implementation == choice


def test_attention_that_is_not_there(tmp_path):
    """Guards an attention that the installation does not have, refused with its name."""
    name = str(write_bert(tmp_path))
    config = ModelConfig(name=name, attn_implementation="flash_attention_3")
    with pytest.raises(ConfigError, match=r"flash_attention_3|FlashAttention"):
        meta_model(config, 2)


def test_too_long_an_input(tmp_path):
    """Guards against an index error on the first long example."""
    config = ModelConfig(name=str(write_bert(tmp_path)))
    with pytest.raises(ConfigError, match=r"max_seq_length: 41 is more than the 40 tokens"):
        load_tokenizer(config, 41)


def test_meta_model_takes_no_memory(tmp_path):
    """Guards `plan`: a config.json is enough, for a model larger than the machine too."""
    BertConfig(num_hidden_layers=500, hidden_size=4096, num_attention_heads=8).save_pretrained(
        tmp_path
    )
    model = meta_model(ModelConfig(name=str(tmp_path)), 5)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.classifier.out_features == 5


def test_models_that_are_not_there(tmp_path, monkeypatch):
    """Guards the message and the seconds: a folder without weights, no folder at all, offline."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    began = time.monotonic()
    for name, message in [
        (str(tmp_path / "nope"), r"model\.name: there is no folder"),
        ("someone/no-such-model", r"model\.name: there is no folder 'someone/no-such-model'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_tokenizer(ModelConfig(name=name))
    assert time.monotonic() - began < 4
    BertConfig().save_pretrained(tmp_path)
    config = ModelConfig(name=str(tmp_path))
    with pytest.raises(ConfigError, match=r"model\.name: .* holds no weights"):
        load_model(config, load_tokenizer(ModelConfig(name=str(write_bert(tmp_path / "b")))), 2)


def test_damaged_files(tmp_path):
    """Guards the messages for weights and tokenizers that cannot be read."""
    config = ModelConfig(name=str(write_bert(tmp_path)))
    tokenizer = load_tokenizer(config)
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ConfigError, match=r"cannot be built: .*; check its files"):
        load_model(config, tokenizer, 2)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"the tokenizer of .* cannot be loaded"):
        load_tokenizer(config)


def test_a_model_of_another_kind(tmp_path):
    """Guards the message for a model that classifies no text."""
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="of type 'vit', for which transformers has no sequence"):
        meta_model(ModelConfig(name=str(tmp_path)), 2)


def test_quantisation(monkeypatch):
    """Guards the settings, and the remedy where bitsandbytes is missing."""
    config = ModelConfig(name="minilm", quantization="4bit", precision="bf16")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes.*fish-tuning\[quantization\]"):
        quantization_options(config)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    settings = quantization_options(config)["quantization_config"]
    assert settings.load_in_4bit and settings.bnb_4bit_compute_dtype == torch.bfloat16
    assert "classifier" in settings.llm_int8_skip_modules
    assert quantization_options(ModelConfig(name="minilm")) == {}


def test_models_that_do_not_write(tmp_path):
    """Guards against encoders, which see what they should predict, and heads drawn at random."""
    encoder = ModelConfig(name=str(write_bert(tmp_path / "encoder")))
    with pytest.raises(ConfigError, match=r"model\.name: .* is an encoder, which sees the tokens"):
        meta_model(encoder, 0)
    headless = ModelConfig(name=str(write_llama(tmp_path / "headless")))
    meta_model(headless, 0)
    with pytest.raises(ConfigError, match=r"model\.name: the weights of .* lack lm_head\.weight"):
        load_model(headless, load_tokenizer(headless), 0)
    tied = ModelConfig(name=headless.name, config_overrides={"tie_word_embeddings": True})
    load_model(tied, load_tokenizer(tied), 0)


def kinds_that_say_they_are_no_decoders():
    """Types of configs by which transformers builds language models although they deny it."""
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[kind]()
        except Exception:
            continue  # It has no default, and none of the models below.
        if getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder:
            yield kind


def test_a_kind_is_told_from_its_layers(tmp_path):
    """Guards GPT-NeoX and its like, whose attention is causal although their configs do not say."""
    always_causal = {"gpt_neox", "gpt_neox_japanese", "trocr"}
    kinds = set(kinds_that_say_they_are_no_decoders())
    assert always_causal < kinds
    for kind in kinds:
        CONFIG_MAPPING[kind]().save_pretrained(tmp_path / kind)
        config = ModelConfig(name=str(tmp_path / kind))
        if kind in always_causal:
            meta_model(config, 0)
            continue
        assert kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES or kind == "bert-generation"
        with pytest.raises(ConfigError, match="is_decoder"):
            meta_model(config, 0)


def test_sizes_of_nothing(tmp_path):
    """Guards against a model without words, which some classes build."""
    config = ModelConfig(name=str(write_llama(tmp_path)), config_overrides={"vocab_size": 0})
    with pytest.raises(ConfigError, match=r"vocab_size of .* is 0, and must be at least 1"):
        meta_model(config, 0)


def test_a_classifier_needs_no_pad_token_for_its_shapes(tmp_path):
    """Guards plans of decoders whose pad token only the tokenizer knows."""
    config = ModelConfig(name=str(write_llama(tmp_path)))
    assert meta_model(config, 2).config.pad_token_id == 0
