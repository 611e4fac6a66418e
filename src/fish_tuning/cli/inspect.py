"""`fish-tuning inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from fish_tuning.cli.terminal import quiet_libraries, show, stdout, user_errors

MASK_FILE = "fish_mask.json"
PICTURE_FILE = "fish_mask.png"


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

        from fish_tuning.experiments.report.density import density_table
        from fish_tuning.mask import FishMask

        mask = FishMask.from_pretrained(home)
        show(str(home))
        stdout().print(
            f"{mask.num_trainable:,} of {mask.num_entries:,} entries selected "
            f"({mask.density:.2%}) in {len(mask)} tensors"
        )
        stdout().print(density_table(mask).terminal(total=True))

        from fish_tuning.experiments.report.density_figure import save_mask_picture

        path = picture or home / PICTURE_FILE
        save_mask_picture(mask, path)
        show(f"picture: {path}")


def _find_mask(folder: Path) -> Path:
    """Find the one mask in a folder or its subfolders, and return its folder."""
    from fish_tuning.experiments.errors import ConfigError

    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: is not a folder; name the folder of a mask, an adapter or a run"
        )
    if (folder / MASK_FILE).is_file():
        return folder
    found = sorted(path.parent for path in folder.rglob(MASK_FILE))
    if not found:
        raise ConfigError(
            f"{folder}: has no {MASK_FILE}, nor do its subfolders; name the folder of a masked arm "
            "(dense arms have no mask)"
        )
    if len(found) > 1:
        raise ConfigError(
            f"{folder}: holds {len(found)} masks; name one of them:\n  "
            + "\n  ".join(map(str, found))
        )
    return found[0]
