"""Where a model's masked tensors are, told again whenever the model's structure changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from peft import PeftModel
from peft.tuners.adaption_prompt import AdaptionPromptModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from fish_tuning.masked_tensors.reconcile import unfit
from fish_tuning.masked_tensors.tensors import MaskedTensor, Place
from fish_tuning.names import without_wrappers

Edge = tuple[nn.Module | None, str, nn.Module]
"""A module, the name of a submodule, and the submodule. None stands for the model itself, which
its state must not keep alive."""


def entrances(root: nn.Module) -> Iterator[nn.Module]:
    """The modules through which a model is called: `generate` calls the one inside PEFT's."""
    module: Any = root
    while True:
        yield module
        if isinstance(module, PeftModel):
            module = module.base_model
        elif isinstance(module, BaseTuner):
            module = module.model
        else:
            return


def is_unchanged(root: nn.Module, edges: Iterable[Edge]) -> bool:
    """Whether a model and its modules still have the submodules they had."""
    return all(
        (root if parent is None else parent)._modules.get(name) is child
        for parent, name, child in edges
    )


def are_gone(root: nn.Module, tensors: Iterable[MaskedTensor]) -> bool:
    """Whether a model has none of the modules that hold these tensors any more."""
    return not paths_of(root, (place for tensor in tensors for place in tensor.places))


def locate(root: nn.Module, tensors: Iterable[MaskedTensor]) -> list[Edge]:
    """Name the places of masked tensors as they lie in a model now; return the edges to them."""
    places = [place for tensor in tensors for place in tensor.places]
    paths = paths_of(root, places)
    set_aside = _set_aside(root)
    edges: dict[Edge, None] = {}
    for place in places:
        found = paths.get(place.module)
        if not found:
            if place.module in set_aside:
                continue
            raise unfit(f"{place.name} is no longer in it")
        names = [
            without_wrappers(f"{path}.{place.attribute}" if path else place.attribute)
            for path in found
        ]
        place.name = place.name if place.name in names else names[0]
        module = root
        for name in filter(None, found[0].split(".")):
            child = module._modules[name]
            assert child is not None
            edges[None if module is root else module, name, child] = None
            module = child
    return list(edges)


def _set_aside(root: nn.Module) -> set[nn.Module]:
    """Modules that PEFT takes out of a model while their adapter is not active."""
    models = [module for module in root.modules() if isinstance(module, AdaptionPromptModel)]
    layers = (each for model in models for each in model._cached_adapters.values())
    return {inner for kept in layers for layer in kept for inner in layer.modules()}


def paths_of(root: nn.Module, places: Iterable[Place]) -> dict[nn.Module, list[str]]:
    """All paths of the places' modules in a model; shared modules have several."""
    modules = {place.module for place in places}
    paths: dict[nn.Module, list[str]] = {}
    for path, module in _walk(root):
        if module in modules:
            paths.setdefault(module, []).append(path)
    return paths


def _walk(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules by path, shared ones under each: `named_modules` of a masked model does more."""
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{path}.{name}" if path else name)
