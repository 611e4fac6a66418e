"""Load the tokenizer and the model that a config names."""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from fish_tuning.experiments.config.model import ModelConfig
from fish_tuning.experiments.errors import ConfigError, first_line
from fish_tuning.experiments.models.find import (
    PACKAGED,
    check_model,
    check_quantization,
    packaged_path,
)
from fish_tuning.experiments.models.gguf import converted_gguf
from fish_tuning.scoring.quantized import keep_differentiable

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from fish_tuning.experiments.metrics.names import Task

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADS = ["classifier", "score", "classification_head", "lm_head"]


def load_tokenizer(config: ModelConfig, max_seq_length: int | None = None) -> Any:
    """Load the tokenizer, with a pad token.

    The pad token is the one that `config_overrides.pad_token_id` sets, or else the tokenizer's
    own, or else its end-of-sequence token, as is usual for decoders without a pad token.

    Args:
        config: The model.
        max_seq_length: The length of the longest input, if the model should be checked for it.

    Raises:
        ConfigError: There is no such model, its tokenizer cannot be loaded or has no token to
            pad with, or the model does not take inputs of that length.
    """
    source = _source(config)
    tokenizer: PreTrainedTokenizerBase = _loaded(AutoTokenizer, source, config)
    pad_id = config.config_overrides.get("pad_token_id")
    if pad_id is not None:
        token = tokenizer.convert_ids_to_tokens(pad_id) if pad_id < len(tokenizer) else None
        if token is None:
            raise ConfigError(
                f"model.config_overrides.pad_token_id: {pad_id} is not among the tokenizer's "
                f"{len(tokenizer)} tokens; name one of them"
            )
        tokenizer.pad_token = token
    elif tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"model.name: the tokenizer of {config.name!r} has neither a pad token nor an end "
                "of sequence; set model.config_overrides.pad_token_id"
            )
        tokenizer.pad_token = tokenizer.eos_token
    if max_seq_length is not None:
        check_length(config, max_seq_length, tokenizer)
    return tokenizer


def check_length(
    config: ModelConfig, length: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Check that the model takes inputs of a length, as far as is known.

    Args:
        config: The model.
        length: The length of the longest input.
        tokenizer: Its tokenizer, which may know a shorter one than the model's config.

    Raises:
        ConfigError: It does not.
    """
    longest = longest_input(config, tokenizer)
    if length > longest:
        raise ConfigError(
            f"training.max_seq_length: {length} is more than the {longest} tokens that "
            f"{config.name!r} takes; lower it"
        )


def model_config(
    config: ModelConfig,
    num_labels: int | None = None,
    label_names: Sequence[str] = (),
    task: Task = "classification",
) -> PretrainedConfig:
    """Load the model's config.json and apply the experiment's settings to it.

    Args:
        config: The model.
        num_labels: The number of the head's outputs.
        label_names: The classes in the order of their ids.
        task: Determines the loss.

    Raises:
        ConfigError: There is no such model, or `config_overrides` has a key that its config lacks
            or a value that it refuses.
    """
    known: PretrainedConfig = _loaded(AutoConfig, _source(config), config)
    for key, value in config.config_overrides.items():
        if not hasattr(known, key):
            near = difflib.get_close_matches(key, known.to_dict(), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; remove it"
            raise ConfigError(
                f"model.config_overrides: the config of {config.name!r} has no {key!r}{hint}"
            )
        try:
            setattr(known, key, value)
        # transformers' versions raise different errors for a value of the wrong type.
        except Exception as error:
            raise ConfigError(
                f"model.config_overrides.{key}: {value!r} is refused: {error}; correct it"
            ) from None
    if config.attn_implementation is not None:
        known._attn_implementation = config.attn_implementation
    if num_labels is not None:
        names = label_names or [f"LABEL_{i}" for i in range(num_labels)]
        known.num_labels = num_labels
        known.id2label = dict(enumerate(names))
        known.label2id = {name: i for i, name in enumerate(names)}
        known.problem_type = "regression" if task == "regression" else "single_label_classification"
    return known


def meta_model(config: ModelConfig, num_labels: int) -> PreTrainedModel:
    """Build the model's architecture from its config.json alone: shapes without weights.

    Args:
        config: The model.
        num_labels: The number of the head's outputs; 0 for a language model.

    Raises:
        ConfigError: There is no such model, or transformers cannot use it for the task.
    """
    own = model_config(config, num_labels or None)
    family: Any = AutoModelForSequenceClassification if num_labels else AutoModelForCausalLM
    _check_sizes(config, own)
    if num_labels and getattr(own, "pad_token_id", None) is None:
        own.pad_token_id = 0  # Which one it is, the tokenizer knows.
    with torch.device("meta"):
        model: PreTrainedModel = _built(
            config, own, lambda: family.from_config(own, dtype=torch.float32)
        )
    if not num_labels and _is_encoder(model):
        raise ConfigError(
            f"model.name: {config.name!r} is an encoder, which sees the tokens that it would have "
            "to predict; name a language model, or set model.config_overrides.is_decoder: true"
        )
    return model


def _is_encoder(model: PreTrainedModel) -> bool:
    """Whether tokens attend to those that follow, of a model that can be encoder or decoder.

    The layers of such a model know what they are. The config alone does not tell: GPT-NeoX's says
    that it is no decoder, as configs do by default, and its attention is causal in any case.
    """
    if model.config.is_encoder_decoder or getattr(model.config, "is_decoder", None) is not False:
        return False
    return any(getattr(module, "is_decoder", None) is False for module in model.modules())


_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


def _check_sizes(config: ModelConfig, own: PretrainedConfig) -> None:
    """Check what some classes build a model of no use from."""
    text: Any = own.get_text_config()
    for name in _SIZES:
        size = getattr(text, name, None)
        if isinstance(size, int) and size < 1:
            raise ConfigError(
                f"model.name: {name} of {config.name!r} is {size}, and must be at least 1; correct "
                f"its config.json or set model.config_overrides.{name}"
            )


def load_model(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    num_labels: int,
    label_names: Sequence[str] = (),
    task: Task = "classification",
) -> PreTrainedModel:
    """Load a language model as it is, or a classifier with a new head.

    The head is drawn from torch's current random state.

    Args:
        config: The model.
        tokenizer: Its tokenizer, whose pad token becomes the model's.
        num_labels: The number of the head's outputs; 0 for a language model.
        label_names: The classes in the order of their ids.
        task: Determines the loss.

    Raises:
        ConfigError: There is no such model, it has no weights, transformers cannot use it for the
            task, or it cannot be quantized on this machine.
    """
    own = model_config(config, num_labels or None, label_names, task)
    own.pad_token_id = tokenizer.pad_token_id
    options: dict[str, Any] = {"dtype": DTYPES[config.precision]}
    options |= quantization_options(config)
    source = _source(config, weights=True)
    family: Any = AutoModelForSequenceClassification if num_labels else AutoModelForCausalLM
    model: PreTrainedModel
    model, loaded = _built(
        config,
        own,
        lambda: family.from_pretrained(
            source,
            config=own,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **options,
        ),
    )
    if not num_labels:
        _check_head_loaded(config, model, loaded["missing_keys"])
    keep_differentiable(model)
    return model


def _check_head_loaded(config: ModelConfig, model: Any, missing: Collection[str]) -> None:
    """Check that a language model predicts with trained weights, not with new random ones."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head and f"{name}.weight" in missing:
            raise ConfigError(
                f"model.name: the weights of {config.name!r} lack {name}.weight, with which a "
                "language model predicts; name a language model, or set "
                "model.config_overrides.tie_word_embeddings: true if it shares its embeddings"
            )


def _source(config: ModelConfig, *, weights: bool = False) -> str:
    """Return the folder or hub id, after checking that it exists."""
    check_model(config, weights=weights)
    path = packaged_path(config.name) if config.name in PACKAGED else Path(config.name)
    if config.gguf_file is None and path.suffix != ".gguf":
        return str(path) if config.name in PACKAGED else config.name
    try:
        if config.gguf_file is not None:
            local = path / config.gguf_file
            path = local if path.is_dir() else Path(hf_hub_download(config.name, config.gguf_file))
        return str(converted_gguf(path))
    # Hub clients and the readers of the file have no common base class for their errors.
    except Exception as error:
        raise ConfigError(
            f"model: {config.gguf_file or config.name!r} cannot be converted from GGUF: "
            f"{first_line(error)}; check the file"
        ) from error


def _loaded(kind: Any, source: str, config: ModelConfig) -> Any:
    try:
        return kind.from_pretrained(source, trust_remote_code=config.trust_remote_code)
    # Hub clients, tokenizers and remote code have no common base class for their errors.
    except Exception as error:
        what = "tokenizer" if kind is AutoTokenizer else "config.json"
        raise ConfigError(
            f"model.name: the {what} of {config.name!r} cannot be loaded: {first_line(error)}; "
            "check the name, the network and the files"
        ) from error


def _built(config: ModelConfig, own: PretrainedConfig, build: Callable[[], Any]) -> Any:
    try:
        model = build()
    except torch.OutOfMemoryError:
        raise
    # No common base class, see `_loaded`. A missing classification head is a plain ValueError.
    except Exception as error:
        if "Unrecognized configuration class" in str(error):
            what = "sequence classification" if own.problem_type else "language model"
            raise ConfigError(
                f"model.name: {config.name!r} is of type {own.model_type!r}, for which "
                f"transformers has no {what}; name another model"
            ) from None
        raise ConfigError(
            f"model.name: {config.name!r} cannot be built: {first_line(error)}; check its files, "
            "model.config_overrides and model.attn_implementation"
        ) from error
    return model


def longest_input(config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> int:
    """Return the number of tokens that the model has positions for, as far as is known."""
    own = model_config(config)
    # RoBERTa's positions start after the padding index; its tokenizer knows the real limit.
    known = [
        getattr(own, "max_position_embeddings", None),
        None if tokenizer is None else tokenizer.model_max_length,
    ]
    return min((int(limit) for limit in known if limit), default=sys.maxsize)


def quantization_options(config: ModelConfig) -> dict[str, Any]:
    """Return the arguments of from_pretrained that quantize the frozen weights, if any.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if config.quantization is None:
        return {}
    check_quantization(config)
    bits: dict[str, Any] = {"load_in_8bit": True}
    if config.quantization == "4bit":
        bits = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": DTYPES[config.precision],
        }
    settings: Any = BitsAndBytesConfig
    # A classification head is trained, and the head of a language model is tied or sensitive.
    return {
        "quantization_config": settings(llm_int8_skip_modules=HEADS, **bits),
        "device_map": "auto",
    }
