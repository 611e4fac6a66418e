"""`fish-tuning pack` and `fish-tuning unpack`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fish_tuning.cli.terminal import quiet_libraries, say, show, stdout, user_errors

if TYPE_CHECKING:
    from fish_tuning.experiments.tables import Table
    from fish_tuning.packing import PackReport

Start = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder of the adapter before training, or of the model that was fine-tuned.",
        show_default=False,
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Folder or hub id of the base model; by default, the one that the adapter names.",
        show_default=False,
    ),
]

_MARK = b"fish_tuning_pack"
"""The key of a packed file's metadata, in the safetensors header."""

_HEADER_LIMIT = 2**20

_ROW_NAMES = {
    "selected": "selected",
    "constant": "frozen, one constant",
    "seed": "frozen, drawn from the seed",
    "start": "frozen, as in the start",
    "stored": "frozen, stored",
}


def pack(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Folder of an adapter or model with its mask.", show_default=False
        ),
    ],
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="The file to write.", show_default=False)
    ],
    seed: Annotated[
        int | None,
        typer.Option(
            help="The seed that torch had right before the adapter was added.",
            show_default=False,
        ),
    ] = None,
    start: Start = None,
    base: Base = None,
) -> None:
    """Pack an adapter into its trained values, a bit mask and how to rebuild everything else."""
    with user_errors():
        quiet_libraries()

        from fish_tuning.packing import pack as pack_folder

        report = pack_folder(folder, file, seed=seed, start=start, base_model=base)
        stdout().print(_table(report).terminal())
        ratio = report.packed_bytes / max(1, report.weights_bytes)
        show(
            f"{file}: {report.packed_bytes:,} bytes, {ratio:.1%} of the {report.weights_bytes:,} "
            "of the weights file"
        )
        if report.left_out:
            say(f"note: not packed: {', '.join(report.left_out)}")


def unpack(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A file that fish-tuning pack wrote.", show_default=False
        ),
    ],
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder to write.", show_default=False)
    ],
    start: Start = None,
    base: Base = None,
) -> None:
    """Write the folder that was packed, with exactly the same bytes."""
    with user_errors():
        _check_packed(file)
        quiet_libraries()

        from fish_tuning.packing import unpack as unpack_file

        unpack_file(file, folder, start=start, base_model=base)
        before = file.stat().st_size
        after = sum(path.stat().st_size for path in folder.iterdir())
        show(f"{folder}: {after:,} bytes from {before:,}")


def _check_packed(file: Path) -> None:
    """Refuse a file of another kind before torch is imported, which takes seconds."""
    if file.is_file():
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = stream.read(min(length, _HEADER_LIMIT))
        if _MARK not in header:
            raise ValueError(
                f"{file} cannot be used: it is not a file that fish-tuning pack wrote. Fetch or "
                "copy it again, or pack the model again."
            )


def _table(report: PackReport) -> Table:
    from fish_tuning.experiments.tables import Table

    rows = [
        (name, f"{report.entries[kind]:,}", f"{report.sizes.get(kind, 0):,}")
        for kind, name in _ROW_NAMES.items()
        if report.entries[kind]
    ]
    other = report.packed_bytes - sum(report.sizes.values())
    rows.append(("mask, names, configs", "", f"{other:,}"))
    return Table(("entries", "count", "bytes"), tuple(rows))
