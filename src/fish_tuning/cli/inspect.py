"""`fish-tuning inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fish_tuning.cli.terminal import quiet_libraries, stdout, user_errors
from fish_tuning.names import place_of

if TYPE_CHECKING:
    from rich.table import Table

    from fish_tuning.mask.mask import FishMask

MASK_FILE = "fish_mask.json"
PICTURE_FILE = "fish_mask.png"

Counts = dict[tuple[str, str], tuple[int, int]]


def inspect(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Folder of a mask, an adapter or a run.", show_default=False
        ),
    ],
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"Where to draw the mask; by default {PICTURE_FILE} beside it.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show what a mask selects, by layer and module, as a table and as a picture."""
    with user_errors():
        home = _find_mask(folder)
        quiet_libraries()

        from fish_tuning.mask.mask import FishMask

        mask = FishMask.from_pretrained(home)
        stdout().print(str(home), markup=False, soft_wrap=True)
        stdout().print(
            f"{mask.num_trainable:,} of {mask.num_entries:,} entries selected "
            f"({mask.density:.2%}) in {len(mask)} tensors"
        )
        stdout().print(density_table(mask))

        from fish_tuning.experiments.report.figures import save_mask_picture

        path = picture or home / PICTURE_FILE
        save_mask_picture(mask, path)
        stdout().print(f"picture: {path}", markup=False, soft_wrap=True)


def _find_mask(folder: Path) -> Path:
    """Return the folder of the one mask at or below a folder."""
    from fish_tuning.experiments.config.load import ConfigError

    if not folder.is_dir():
        raise ConfigError(f"{folder}: is no folder; name that of a mask, an adapter or a run")
    if (folder / MASK_FILE).is_file():
        return folder
    found = sorted(path.parent for path in folder.rglob(MASK_FILE))
    if not found:
        raise ConfigError(
            f"{folder}: there is no {MASK_FILE} in it or below; name the folder of a masked arm "
            "(those of dense arms have none)"
        )
    if len(found) > 1:
        raise ConfigError(
            f"{folder}: holds {len(found)} masks; name one of them:\n  "
            + "\n  ".join(map(str, found))
        )
    return found[0]


def density_table(mask: FishMask) -> Table:
    """Density of a mask: a row for each layer, a column for each module, and for LoRA's A and B."""
    from rich.table import Table

    modules: Counts = {}
    sides: Counts = {}
    for name, bits in mask.items():
        place = place_of(name)
        layer = "-" if place.layer is None else str(place.layer)
        module = place.module.rpartition(".")[2]
        counts = int(bits.sum()), bits.numel()
        for row in (layer, "all"):
            for cells, column in ((modules, module), (sides, place.side), (sides, "all")):
                selected, entries = cells.get((row, column), (0, 0))
                if column:
                    cells[row, column] = selected + counts[0], entries + counts[1]
    cells = modules | sides
    columns = list(dict.fromkeys(column for _, column in modules))
    columns += [side for side in ("A", "B") if ("all", side) in sides] + ["all"]
    rows = [row for row in dict.fromkeys(row for row, _ in sides) if row != "all"]
    table = Table("layer")
    for column in columns:
        table.add_column(column, justify="right")
    for row in [*rows, "all"]:
        if row == "all":
            table.add_section()
        table.add_row(row, *(_density(cells.get((row, column))) for column in columns))
    return table


def _density(counts: tuple[int, int] | None) -> str:
    return "" if counts is None else f"{counts[0] / max(1, counts[1]):.2%}"
