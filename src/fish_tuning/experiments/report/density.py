"""Where a mask's selected entries are: by layer, module and side of LoRA."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fish_tuning.experiments.results import TensorDensity, tensor_densities
from fish_tuning.experiments.tables import Table
from fish_tuning.mask import FishMask
from fish_tuning.names import Place, place_of


class Counts(NamedTuple):
    """Selected entries, and all entries they were selected from."""

    selected: int
    entries: int

    @property
    def density(self) -> float:
        """The selected fraction."""
        return self.selected / self.entries


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


def picture_kind(path: str | os.PathLike[str]) -> str:
    """The format that a picture's file name asks for: "png" or "svg".

    Raises:
        ValueError: The name has another ending.
    """
    kind = Path(path).suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise ValueError(f"A picture is a .png or .svg file, and {str(path)!r} is neither.")
    return kind
