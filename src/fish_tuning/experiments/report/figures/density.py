"""Where a mask's selected entries are: by layer, module and side of LoRA."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fish_tuning.experiments.results import TensorDensity, tensor_densities
from fish_tuning.experiments.tables import Table
from fish_tuning.mask import FishMask
from fish_tuning.names import Place, place_of

# Title of the panel of each side; the third is for what is not LoRA.
_PANELS = {"A": "A", "B": "B", "": "other"}


class Counts(NamedTuple):
    """Selected entries, and all entries they were selected from."""

    selected: int
    entries: int

    @property
    def density(self) -> float:
        """The selected fraction."""
        return self.selected / self.entries


@dataclass(frozen=True)
class Panel:
    """A map of numbers, with a row per layer and a column per module.

    Attributes:
        title: The side of LoRA; empty if there is only one panel of what is not LoRA.
        layers: Labels of the rows.
        modules: Labels of the columns.
        values: Row by row; None where a layer has no such module.
    """

    title: str
    layers: tuple[str, ...]
    modules: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


def count_by_place(tensors: Iterable[TensorDensity]) -> dict[Place, Counts]:
    """Add up the entries of tensors at the same place, such as those of several seeds."""
    counts: dict[Place, Counts] = {}
    for tensor in tensors:
        if tensor.entries:
            place = place_of(tensor.name)
            selected, entries = counts.get(place, (0, 0))
            counts[place] = Counts(selected + tensor.selected, entries + tensor.entries)
    return counts


def short_names(modules: Iterable[str]) -> dict[str, str]:
    """Map each module's path to its shortest ending that no other path has."""
    paths = {module: module.split(".") for module in modules}
    names = {}
    for module, path in paths.items():
        others = [other for key, other in paths.items() if key != module]
        length = 1
        while length < len(path) and any(path[-length:] == other[-length:] for other in others):
            length += 1
        names[module] = ".".join(path[-length:])
    return names


def density_table(mask: FishMask) -> Table:
    """Density of a mask: a row per layer, a column per module and for each side of LoRA."""
    counts = count_by_place(tensor_densities(mask))
    names = short_names(place.module for place in counts)
    rows, modules, sides = (defaultdict[str, set[Place]](set) for _ in range(3))
    for place in counts:
        rows["-" if place.layer is None else str(place.layer)].add(place)
        modules[names[place.module]].add(place)
        if place.side:
            sides[place.side].add(place)
    columns = {**modules, **dict(sorted(sides.items())), "all": set(counts)}

    def density(places: set[Place]) -> str:
        entries = sum(counts[place].entries for place in places)
        return f"{sum(counts[place].selected for place in places) / entries:.2%}" if entries else ""

    return Table(
        ("layer", *columns),
        tuple(
            (row, *(density(of_row & of_column) for of_column in columns.values()))
            for row, of_row in {**rows, "all": set(counts)}.items()
        ),
    )


def mask_densities(tensors: Iterable[TensorDensity]) -> tuple[dict[Place, float], list[str]]:
    """Return the densities to draw, and the modules that are trained in full and not drawn.

    If there are A and B, modules outside the numbered layers that are trained in full (the head)
    are not drawn.

    Args:
        tensors: Tensors of one mask, or of several over which the densities are the mean.
    """
    counts = count_by_place(tensors)
    heads = [
        place
        for place, (selected, entries) in counts.items()
        if not place.side and place.layer is None and selected == entries
    ]
    if not any(place.side for place in counts):
        heads = []
    densities = {place: count.density for place, count in counts.items() if place not in heads}
    return densities, [place.module for place in heads]


def panels(values: Mapping[Place, float]) -> list[Panel]:
    """Arrange numbers by place: a panel for A, for B and for everything else."""
    modules = {
        side: list(dict.fromkeys(place.module for place in values if place.side == side))
        for side in _PANELS
        if any(place.side == side for place in values)
    }
    names = short_names({place.module for place in values})
    # Modules outside the numbered layers come below all layers.
    layers = sorted({place.layer for place in values}, key=lambda n: (n is None, n or 0))
    return [
        Panel(
            title=_PANELS[side] if any(modules) else "",
            layers=tuple("none" if layer is None else str(layer) for layer in layers),
            modules=tuple(names[module] for module in of_side),
            values=tuple(
                tuple(values.get(Place(layer, module, side)) for module in of_side)
                for layer in layers
            ),
        )
        for side, of_side in modules.items()
    ]
