"""Where the per-example gradients of each parameter come from: which modules, and by what rule."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fish_tuning.per_example.closed_forms import Rule, embedding_weight, rule_for
from fish_tuning.per_example.recomputed import Recomputed


class NoRuleError(Exception):
    """Gradients of one pass do not hold for this model; the message says where and why.

    Args:
        message: Where and why.
        modules: Those whose gradients do not hold.
    """

    def __init__(self, message: str, modules: Iterable[nn.Module] = ()) -> None:
        super().__init__(message)
        self.modules = list(modules)


Group = tuple[str, ...]
"""Parameters whose gradients come from the same modules, and are computed together."""


class Sources:
    """The modules that are watched, and the parameters whose gradients each of them gives.

    A parameter's own module gives its gradient where a closed form is known. Of an adapter with
    others the whole layer is recomputed; so is a module of any other kind.

    Attributes:
        closed: Rules by module and parameter.
        recomputed: The modules that are run again.
        groups: Whose gradients a module gives.
        looked_up: Groups of embeddings alone, of whose rows few have a gradient.
        entries: How many an example has of the largest thing that a group's gradients are made of.
        running: Whether a module is run again just now.

    Args:
        model: The model.
        parameters: Of the model, by name.

    Raises:
        NoRuleError: A parameter belongs to no module that could be called.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self._model, self._parameters = model, parameters
        self._layers: dict[nn.Module, list[nn.Module]] = defaultdict(list)
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                for part in _parts(layer):
                    self._layers[part].append(layer)
        self._chosen: dict[nn.Module, None] = {}
        self.running = False
        self.closed: dict[nn.Module, dict[str, Rule]] = {}
        self.recomputed: dict[nn.Module, Recomputed] = {}
        self.groups: dict[nn.Module, list[Group]] = {}
        self.looked_up: set[Group] = set()
        self.entries: dict[Group, int] = {}
        self._assign()

    def recompute(self, modules: Iterable[nn.Module]) -> bool:
        """Recomputes these modules from now on, or the adapter layers that they are part of.

        Returns:
            Whether that is anything new.
        """
        before = len(self._chosen)
        for module in modules:
            self._chosen |= dict.fromkeys(self._layers.get(module) or [module])
        if len(self._chosen) == before:
            return False
        self._assign()
        return True

    def givers(self, names: Iterable[str]) -> list[nn.Module]:
        """The modules that give the gradients of these parameters."""
        wanted = set(names)
        return [
            module
            for module, groups in self.groups.items()
            if any(wanted.intersection(group) for group in groups)
        ]

    def gradients(
        self,
        group: Group,
        module: nn.Module,
        x: Tensor,
        g: Tensor,
        dtype: torch.dtype,
        autocast: torch.dtype | None,
    ) -> Iterator[tuple[str, Tensor]]:
        """What one call of a module adds to each example's gradients, (b, *shape), by name.

        Args:
            group: Whose gradients.
            module: Which was called.
            x: Its input, (b, ...).
            g: Its output's gradient, (b, ...).
            dtype: Of the gradients.
            autocast: What the forward pass was cast to, if it was.
        """
        if (unit := self.recomputed.get(module)) is not None:
            self.running = True
            try:
                found = unit.gradients(x, g, autocast)
            finally:
                self.running = False
            for name in group:
                if name in found:
                    # They may be views of g, or of one row for all, and are raised in place.
                    own = torch.empty_like(found[name], dtype=dtype)
                    yield name, own.copy_(found[name])
            return
        x = x.to(dtype) if x.is_floating_point() else x
        g = g.to(dtype)
        rules = self.closed[module]
        yield from ((name, rules[name](module, x, g)) for name in group if name in rules)

    def _assign(self) -> None:
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        parts = {part for module in self._chosen for part in module.modules() if part is not module}
        outermost = [module for module in self._chosen if module not in parts]
        self.recomputed = {module: Recomputed(module, self._parameters) for module in outermost}
        self.closed = defaultdict(dict)
        lacking = []
        for module in self._model.modules():
            if module in self._chosen or module in parts:
                continue
            for attribute, parameter in module._parameters.items():
                if (name := names.get(id(parameter))) is None:
                    continue
                if (rule := rule_for(module, attribute)) is not None:
                    self.closed[module][name] = rule
                elif isinstance(module, nn.ParameterDict | nn.ParameterList) and not (
                    self._layers.get(module)
                ):
                    kind = type(module).__name__
                    raise NoRuleError(f"{name}, {attribute!r} of a {kind}, has no rule")
                else:
                    lacking.append(module)
        if not self.recompute(lacking):
            self._group()

    def _group(self) -> None:
        givers: dict[str, list[nn.Module]] = defaultdict(list)
        for module, unit in self.recomputed.items():
            for name in unit.places:
                givers[name].append(module)
        recomputed = set(givers)
        for module, rules in self.closed.items():
            for name in rules:
                givers[name].append(module)
        together: dict[object, list[str]] = defaultdict(list)
        for name in self._parameters:
            key = frozenset(givers[name]) if name in recomputed else name
            together[key].append(name)
        self.groups, self.looked_up, self.entries = defaultdict(list), set(), {}
        for group in map(tuple, together.values()):
            modules = givers[group[0]]
            for module in modules:
                self.groups[module].append(group)
            if all(self._rule(module, group[0]) is embedding_weight for module in modules):
                self.looked_up.add(group)
            own = sum(self._parameters[name].numel() for name in group)
            units = [self.recomputed[module] for module in modules if module in self.recomputed]
            self.entries[group] = max([own, *(unit.entries for unit in units)])

    def _rule(self, module: nn.Module, name: str) -> Rule | None:
        return self.closed[module].get(name) if module in self.closed else None


def _parts(layer: nn.Module) -> Iterator[nn.Module]:
    """An adapter layer and what it is made of, without other adapter layers inside of it."""
    yield layer
    for child in layer.children():
        if not isinstance(child, BaseTunerLayer):
            yield from _parts(child)
