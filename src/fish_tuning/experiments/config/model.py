"""The section `model`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from fish_tuning.experiments.config.sections import Section
from fish_tuning.experiments.config.values import Text

MINILM = "minilm"
"""The `model.name` of the MiniLM that is installed as a wheel."""

SMOLLM2 = "smollm2"
"""The `model.name` of the SmolLM2-135M-Instruct that is installed as a wheel."""


class ModelConfig(Section):
    """The model that is fine-tuned."""

    name: Text = Field(
        description="Hub id, local folder, or a packaged model: `minilm` (MiniLM) or `smollm2` "
        "(SmolLM2-135M-Instruct, a language model)."
    )
    gguf_file: Text | None = Field(
        default=None,
        description="Name of the GGUF file in the hub's repository or the folder that `name` "
        "stands for; converted once, to float32. Needs the package gguf.",
    )
    config_overrides: dict[str, Any] = Field(
        default={}, description="Values of the model's own config to set, such as pad_token_id."
    )
    precision: Literal["float32", "bf16", "fp16"] = Field(
        default="float32", description="Type of the frozen weights; adapters stay in float32."
    )
    attn_implementation: (
        Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None
    ) = Field(default=None, description="How attention is computed; if null, transformers chooses.")
    quantization: Literal["4bit", "8bit"] | None = Field(
        default=None, description="Quantize the frozen weights; needs bitsandbytes."
    )
    trust_remote_code: bool = Field(
        default=False, description="Run the code in the model's repository."
    )
