"""Which adapter a parameter belongs to, by its name."""

import logging
from collections.abc import Collection

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn

from fish_tuning.mask.mask import FishMask

logger = logging.getLogger(__name__)

_CONTAINERS = (
    # PEFT's, beside those that start with a method's prefix.
    "modules_to_save",
    "prompt_encoder",
    # The adapters library's.
    "adapters",
    "loras",
    "prefix_tunings",
    "prompt_tunings",
    "invertible_adapters",
)


def belongs_to_adapter(name: str, adapter: str) -> bool:
    """Whether a parameter belongs to an adapter.

    An adapter's name stands right after the module that holds one entry per adapter, as in
    `layers.0.q_proj.lora_A.default.weight`. Elsewhere the same word is part of a path: "0" or
    "encoder" are names of layers and can be names of adapters too.

    Args:
        name: As in `model.named_parameters()`.
        adapter: The adapter's name.
    """
    parts = name.split(".")
    return any(parts[place] == adapter for place in _places(parts))


def _places(parts: list[str]) -> list[int]:
    """Where adapters' names stand among the parts of a parameter's name."""
    prefixes = tuple(PEFT_TYPE_TO_PREFIX_MAPPING.values())
    return [
        i
        for i, container in enumerate(parts[:-1], start=1)
        if container in _CONTAINERS or container.startswith(prefixes)
    ]


def for_active_adapter(model: nn.Module, mask: FishMask, parameters: Collection[str]) -> FishMask:
    """Rename the tensors of a mask whose adapter the model has under another name.

    PEFT's files leave the names of adapters out, so that one can be loaded under any name. The
    mask that lies beside it goes with it.

    Args:
        model: The model to mask.
        mask: The mask.
        parameters: The names of the model's parameters.

    Returns:
        The mask of the active adapter, or the same mask if its names are the model's, or would
        not be under the active adapter's name either.
    """
    if not isinstance(model, PeftModel) or not isinstance(model.active_adapter, str):
        return mask
    renamed, adapters = {}, set()
    for name, bits in mask.items():
        parts = name.split(".")
        for place in _places(parts)[:1]:
            adapters.add(parts[place])
            parts[place] = model.active_adapter
        renamed[".".join(parts)] = bits
    if len(adapters) != 1 or adapters <= model.peft_config.keys():
        return mask
    if any(name not in parameters for name in renamed):
        return mask
    logger.info("The mask of adapter %s is applied to %s", *adapters, model.active_adapter)
    return FishMask(renamed, provenance=mask.provenance)
