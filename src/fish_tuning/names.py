"""Parse parameter names: a parameter's layer, its module, its side of a LoRA pair."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_LORA = re.compile(r"(?:^|\.)lora_(?P<kind>(?:embedding_)?(?P<side>[AB]))(?:\.|$)")
_WRAPPER = "base_model.model."
_ADDED_BY_PEFT = ("lora_", "modules_to_save")


@dataclass(frozen=True)
class Place:
    """Where in the model a parameter is.

    Attributes:
        layer: The number of its layer; None outside the numbered layers.
        module: The path of the module that the parameter or its adapter belongs to, below the
            layer: "attention.self.query". The path from the root outside the numbered layers.
        side: Its side of a LoRA pair, as in `side_of`.
    """

    layer: int | None
    module: str
    side: str


def place_of(name: str) -> Place:
    """Splits a parameter's name into layer, module and side.

    Args:
        name: As in `model.named_parameters()`, with or without PEFT's wrapper around the model.
    """
    parts = name.removeprefix(_WRAPPER).split(".")
    added = (i for i, part in enumerate(parts) if part.startswith(_ADDED_BY_PEFT))
    end = next(added, None)
    path = parts[:end] if end is not None else [p for p in parts if p != "default"][:-1]
    path = path or parts
    number = _first_number(path)
    if number is None:
        return Place(None, ".".join(path), side_of(name))
    return Place(int(path[number]), ".".join(path[number + 1 :]), side_of(name))


def without_wrappers(name: str) -> str:
    """The name that a parameter had before torch's checkpoint wrappers were put around layers.

    State dicts have these names all along.
    """
    return ".".join(part for part in name.split(".") if part != "_checkpoint_wrapped_module")


def layer_path(name: str) -> str:
    """The path from the model's root to the numbered layer: "bert.encoder.layer.0".

    Outside the numbered layers this is the first component of the path.
    """
    parts = name.removeprefix(_WRAPPER).split(".")
    return ".".join(parts[: (_first_number(parts) or 0) + 1])


def side_of(name: str) -> str:
    """Which side of a LoRA pair a parameter is: "A", "B", or "" if it is not part of one."""
    match = _LORA.search(name)
    return match["side"] if match else ""


def kind_of(name: str) -> str:
    """Like `side_of`, but "embedding_A" and "embedding_B" for the LoRA of an embedding.

    PEFT starts A at zero there, and B everywhere else, so their scores differ in scale.
    """
    match = _LORA.search(name)
    return match["kind"] if match else ""


def opposite_side(name: str) -> str:
    """The name of the other tensor of a LoRA pair.

    Raises:
        ValueError: The parameter is not part of a LoRA pair.
    """
    match = _LORA.search(name)
    if match is None:
        raise ValueError(f"{name!r} is neither side of a LoRA pair")
    other = "A" if match["side"] == "B" else "B"
    return name[: match.start("side")] + other + name[match.end("side") :]


def without_adapter(name: str) -> Iterator[tuple[str, str]]:
    """What PEFT may save a parameter as: it leaves out the adapter's name and modules_to_save.

    Any part of the name may be the adapter's.

    Yields:
        The part that is taken for the adapter's name, and the name without it.
    """
    parts = name.split(".")
    for i, adapter in enumerate(parts[1:], 1):
        before = parts[: i - 1] if parts[i - 1] == "modules_to_save" else parts[:i]
        yield adapter, ".".join(before + parts[i + 1 :])


def exactly(modules: Iterable[str]) -> str:
    """A regular expression for PEFT's `target_modules` that matches these modules alone.

    In a list, a name would also match as the end of another.
    """
    return "|".join(map(re.escape, modules))


def _first_number(parts: list[str]) -> int | None:
    return next((i for i, part in enumerate(parts) if part.isdecimal()), None)
