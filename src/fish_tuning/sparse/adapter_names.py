"""Which adapter a parameter belongs to, by its name."""

from itertools import pairwise

from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

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
    prefixes = tuple(PEFT_TYPE_TO_PREFIX_MAPPING.values())
    return any(
        key == adapter and (container in _CONTAINERS or container.startswith(prefixes))
        for container, key in pairwise(name.split("."))
    )
