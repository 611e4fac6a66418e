"""The tensors before training: read from files, or drawn from a seed again."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fish_tuning.packing.packed_file import TextName

_AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}

Start: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor]
"""Tensors before training: a folder with safetensors files, or a state dict."""

ModelOrName: TypeAlias = str | os.PathLike[str] | nn.Module
"""A base model, or its folder or hub id."""

ADAPTER_CONFIG: TextName = "adapter_config.json"

VERSIONED = ("torch", "peft", "transformers")
"""The packages that determine which numbers a seed draws."""


def read_start(start: Start) -> Mapping[str, Tensor]:
    """Read all safetensors files in a folder; a mapping of tensors is returned as it is.

    Raises:
        FileNotFoundError: The folder holds no such file.
        ValueError: A file is damaged.
    """
    if isinstance(start, Mapping):
        return start
    paths = sorted(Path(start).glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(
            f"{start} holds no safetensors file: name the folder of the adapter as it was before "
            "training, or of the model that was fine-tuned"
        )
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            tensors |= safetensors.torch.load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a complete safetensors file ({error})") from error
    return tensors


def draw_start(adapter_config: str, seed: int, base_model: ModelOrName | None) -> dict[str, Tensor]:
    """Draw a new adapter, as PEFT does on the CPU right after `torch.manual_seed(seed)`.

    The base model's weights are neither loaded nor changed. They are replaced by zeros, so only
    tensors that depend on nothing but the random numbers come out as they were. Tensors that PEFT
    computes from the weights, such as DoRA's magnitudes, would differ between machines in the last
    bit anyway.

    Args:
        adapter_config: The text of adapter_config.json.
        seed: The seed.
        base_model: A transformers model, or its folder or hub id, of which only the config is
            read. Default: the one that the adapter's config names.

    Returns:
        The tensors by the names that PEFT saves them under, in float32 on the CPU.

    Raises:
        ValueError: The config is damaged, there is no such base model, or PEFT cannot add the
            adapter to it.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    try:
        settings = dict(json.loads(adapter_config))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"adapter_config.json is not a JSON object ({error})") from error
    if base_model is None:
        base_model = settings.get("base_model_name_or_path")
    base = _skeleton(base_model, settings)
    before = torch.get_rng_state()
    try:
        # PEFT warns if the base model now has another name.
        nameless = {**settings, "base_model_name_or_path": None}
        config = PeftConfig.from_peft_type(**nameless)  # type: ignore[no-untyped-call]
        # torch.manual_seed would also seed accelerators, whose state is not restored here.
        torch.default_generator.manual_seed(seed)
        with torch.device("cpu"):
            adapted = get_peft_model(base, config)
        # Otherwise PEFT asks the hub whether the vocabulary was resized.
        return dict(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    # PEFT's methods have no common base class for errors over a config or a model.
    except Exception as error:
        raise ValueError(
            f"the adapter cannot be built on its base model to draw its start ({error}): name the "
            "right base model, or pack with a start folder in place of a seed"
        ) from error
    finally:
        torch.set_rng_state(before)


def _skeleton(base_model: Any, settings: Mapping[str, Any]) -> nn.Module:
    """Build a model of the same modules and shapes, of zeros that take no memory."""
    import transformers

    if isinstance(base_model, nn.Module):
        if not isinstance(base_model, transformers.PreTrainedModel):
            raise ValueError(
                f"a start can be drawn only for transformers' models, not for a "
                f"{type(base_model).__name__}: pass the base model without an adapter, or pack "
                "with a start folder in place of a seed"
            )
        family: Any = type(base_model)
        with torch.device("meta"):
            model: nn.Module = family(copy.deepcopy(base_model.config))
    else:
        try:
            # The name may come from a stranger's file, so the model's own code is never run.
            config = transformers.AutoConfig.from_pretrained(base_model, trust_remote_code=False)
            with torch.device("meta"):
                model = _from_config(config, settings)
        # Hub clients, configs and model classes have no common base class for their errors.
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"the adapter's base model {str(base_model)!r} is needed to draw its start, but "
                f"cannot be loaded ({reason}): name the base model (base_model=, --base)"
            ) from error
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zeros = torch.zeros((), device="cpu").expand(parameter.shape)
                module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                zeros = torch.zeros((), dtype=buffer.dtype, device="cpu")
                module._buffers[name] = zeros.expand(buffer.shape)
    return model


def _from_config(config: Any, settings: Mapping[str, Any]) -> nn.Module:
    """Build the class that the adapter's config names, by PEFT's record of it or by its task."""
    import transformers

    named = (settings.get("auto_mapping") or {}).get("base_model_class")
    family = getattr(transformers, str(named), None)
    if isinstance(family, type) and issubclass(family, transformers.PreTrainedModel):
        model: nn.Module = family(config)
        return model
    auto_class = _AUTO_CLASSES.get(str(settings.get("task_type")), "AutoModel")
    adapted: nn.Module = getattr(transformers, auto_class).from_config(config)
    return adapted
