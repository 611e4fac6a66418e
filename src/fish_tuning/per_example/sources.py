"""Which modules give the per-example gradients of each parameter, and how."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from fish_tuning.per_example.closed_forms import ClosedForm, closed_form_of, embedding_weight
from fish_tuning.per_example.errors import OnePassError
from fish_tuning.per_example.recomputed import Recomputed
from fish_tuning.per_example.sums import GradientSums

Bundle = tuple[str, ...]
"""Names of parameters whose gradients come from the same modules and are computed together."""


@dataclass(frozen=True)
class Call:
    """One call of a module in a forward pass, once backward has reached its output.

    Attributes:
        module: The module.
        x: Its input, (b, ...).
        g: The gradient of its output, (b, ...).
        autocast: The dtype that autocast was set to during the call, if it was on.
    """

    module: nn.Module
    x: Tensor
    g: Tensor
    autocast: torch.dtype | None


class Sources:
    """The modules to watch, and the parameters whose gradients each of them gives.

    A parameter's own module gives its gradient if a closed form is known. If an adapter has other
    parameters too, the whole adapter layer is recomputed; so is any other kind of module.

    Args:
        model: The model.
        sums: Sums of the gradients of some of its parameters.

    Attributes:
        bundles: The bundles whose gradients each module gives.
        recomputed: The modules that are run again.
        lookups: Bundles that only embeddings use: most rows of an example's gradient are zero.
        entries: Size of the largest per-example intermediate of each bundle.
        recomputing: Whether a module is being run again right now.

    Raises:
        OnePassError: A parameter belongs to a module that is never called.
    """

    def __init__(self, model: nn.Module, sums: GradientSums) -> None:
        self._model, self._sums, self._parameters = model, sums, sums.parameters
        self._adapter_layers: dict[nn.Module, list[nn.Module]] = defaultdict(list)
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                for part in _parts(layer):
                    self._adapter_layers[part].append(layer)
        self._to_recompute: dict[nn.Module, None] = {}
        self._closed_forms: dict[nn.Module, dict[str, ClosedForm]] = {}
        self.bundles: dict[nn.Module, list[Bundle]] = {}
        self.recomputed: dict[nn.Module, Recomputed] = {}
        self.lookups: set[Bundle] = set()
        self.entries: dict[Bundle, int] = {}
        self.recomputing = False
        self._assign()

    def recompute(self, modules: Iterable[nn.Module]) -> bool:
        """Recomputes these modules from now on, or the adapter layers that they are part of.

        Returns:
            Whether this changes anything.
        """
        before = len(self._to_recompute)
        for module in modules:
            self._to_recompute |= dict.fromkeys(self._adapter_layers.get(module) or [module])
        if len(self._to_recompute) == before:
            return False
        self._assign()
        return True

    def modules_of(self, names: Iterable[str]) -> list[nn.Module]:
        """The modules that give the gradients of these parameters."""
        wanted = set(names)
        return [
            module
            for module, bundles in self.bundles.items()
            if any(wanted.intersection(bundle) for bundle in bundles)
        ]

    def parameter_of(self, module: nn.Module) -> str:
        """The name of a parameter of a watched module, for messages."""
        return self.bundles[module][0][0]

    def gradients(
        self, bundle: Bundle, call: Call, rows: slice, dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        """What one call of a module adds to the gradients of some examples.

        Args:
            bundle: The parameters.
            call: The call.
            rows: The examples.
            dtype: The dtype of the gradients.

        Yields:
            Names and gradients, (rows, *shape of the parameter's rows in the sums). They may be
            overwritten.
        """
        x, g = call.x[rows], call.g[rows]
        if (recomputed := self.recomputed.get(call.module)) is not None:
            self.recomputing = True
            try:
                found = recomputed.gradients(x, g, call.autocast)
            finally:
                self.recomputing = False
            for name in bundle:
                if name in found:
                    # A copy: these may be views of g, or one row expanded to all examples.
                    gradients = self._sums.parts[name].take(found[name], 1)
                    yield name, torch.empty_like(gradients, dtype=dtype).copy_(gradients)
            return
        x = x.to(dtype) if x.is_floating_point() else x
        g = g.to(dtype)
        forms = self._closed_forms[call.module]
        for name in bundle:
            if name in forms:
                yield name, forms[name](call.module, x, g, self._sums.parts[name])

    def _assign(self) -> None:
        """Finds for each parameter a closed form or a module to recompute."""
        self._sums.settle()  # Modules have to hold the parameters that the sums know.
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        chosen = self._to_recompute
        inner = {part for module in chosen for part in module.modules() if part is not module}
        outermost = [module for module in chosen if module not in inner]
        self.recomputed = {module: Recomputed(module, self._parameters) for module in outermost}
        self._closed_forms = defaultdict(dict)
        without = []
        for module in self._model.modules():
            if module in chosen or module in inner:
                continue
            for attribute, parameter in module._parameters.items():
                if (name := names.get(id(parameter))) is None:
                    continue
                if attribute in vars(module):
                    raise OnePassError(f"{name} is trained in part, so its module holds a tensor")
                if (form := closed_form_of(module, attribute)) is not None:
                    self._closed_forms[module][name] = form
                elif isinstance(module, nn.ParameterDict | nn.ParameterList) and not (
                    self._adapter_layers.get(module)
                ):
                    kind = type(module).__name__
                    raise OnePassError(f"{name}, {attribute!r} of a {kind}, has no rule")
                else:
                    without.append(module)
        if not self.recompute(without):
            self._bundle()

    def _bundle(self) -> None:
        """Puts parameters together that are recomputed in the same modules."""
        modules_of: dict[str, list[nn.Module]] = defaultdict(list)
        for module, recomputed in self.recomputed.items():
            for name in recomputed.local_names:
                modules_of[name].append(module)
        is_recomputed = set(modules_of)
        for module, forms in self._closed_forms.items():
            for name in forms:
                modules_of[name].append(module)
        together: dict[object, list[str]] = defaultdict(list)
        for name in self._parameters:
            key = frozenset(modules_of[name]) if name in is_recomputed else name
            together[key].append(name)
        self.bundles, self.lookups, self.entries = defaultdict(list), set(), {}
        for bundle in map(tuple, together.values()):
            modules = modules_of[bundle[0]]
            for module in modules:
                self.bundles[module].append(bundle)
            if all(self._form(module, bundle[0]) is embedding_weight for module in modules):
                self.lookups.add(bundle)
            own = sum(self._sums.totals[name].numel() for name in bundle)
            again = [self.recomputed[module] for module in modules if module in self.recomputed]
            self.entries[bundle] = max([1, own, *(recomputed.entries for recomputed in again)])

    def _form(self, module: nn.Module, name: str) -> ClosedForm | None:
        return self._closed_forms.get(module, {}).get(name)


def _parts(layer: nn.Module) -> Iterator[nn.Module]:
    """An adapter layer and the modules in it, without other adapter layers inside it."""
    yield layer
    for child in layer.children():
        if not isinstance(child, BaseTunerLayer):
            yield from _parts(child)
