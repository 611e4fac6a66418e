"""`fish-tuning inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from fish_tuning.cli.terminal import quiet_libraries, show, stdout, user_errors

MASK_FILE = "fish_mask.json"
SCORES_FILE = "fish_scores.safetensors"
_KINDS = {MASK_FILE: "masks", SCORES_FILE: "scores"}


def inspect(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="Folder of a mask, scores, an adapter or a run.", show_default=False
        ),
    ],
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw it too, as a .png or .svg file.", show_default=False
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Other scores of the same model to compare with.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show what a mask selects or where scores are high, by layer and module."""
    with user_errors():
        file = _find(folder)
        quiet_libraries()
        if picture is not None:
            # Before anything is shown: matplotlib may be missing, or the name have a wrong ending.
            import matplotlib  # noqa: F401

            from fish_tuning.experiments.report.figures.picture import picture_kind

            picture_kind(picture)
        if file.name == MASK_FILE:
            if compare is not None:
                raise ValueError(f"--compare: compares scores, and {file} is a mask's")
            _show_mask(file.parent, picture)
        else:
            _show_scores(file.parent, picture, compare)
        if picture is not None:
            show(f"picture: {picture}")


def _show_mask(home: Path, picture: Path | None) -> None:
    from fish_tuning.experiments.report.figures.density import density_table
    from fish_tuning.mask import FishMask

    mask = FishMask.from_pretrained(home)
    show(str(home))
    stdout().print(
        f"{mask.num_trainable:,} of {mask.num_entries:,} entries selected "
        f"({mask.density:.2%}) in {len(mask)} tensors"
    )
    stdout().print(density_table(mask).terminal(total=True))
    if picture is not None:
        from fish_tuning.experiments.report.figures.picture import save_mask_picture

        save_mask_picture(mask, picture)


def _show_scores(home: Path, picture: Path | None, compare: Path | None) -> None:
    from fish_tuning.experiments.report.scores import score_figure, score_tables
    from fish_tuning.experiments.tables import Table
    from fish_tuning.scoring import FishScores, compare_scores

    scores = FishScores.from_pretrained(home)
    show(str(home))
    for name, value in scores.provenance.items():
        if value is not None:
            show(f"{name}: {value}")
    if compare is not None:
        other = FishScores.from_pretrained(_find(compare, SCORES_FILE).parent)
        rows = tuple(
            (a.layer, a.side, f"{a.num_entries:,}", f"{a.overlap:.1%}", f"{a.rank_correlation:.3f}")
            for a in compare_scores(scores, other)
        )
        headers = ("layer", "side", "entries", "overlap of the top 10%", "rank correlation")
        stdout().print(Table(headers, rows).terminal())
    else:
        for side, table in score_tables(scores).items():
            show(f"mean score{f' of {side}' if side else ''}")
            stdout().print(table.terminal(total=True))
    if picture is not None:
        from fish_tuning.experiments.report.figures.picture import save_picture

        save_picture(score_figure(scores), picture)


def _find(folder: Path, *names: str) -> Path:
    """Find the one mask or scores file in a folder or its subfolders."""
    from fish_tuning.experiments.errors import ConfigError

    names = names or tuple(_KINDS)
    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: is not a folder; name the folder of a mask, scores, an adapter or a run"
        )
    for name in names:
        if (folder / name).is_file():
            return folder / name
    for name in names:
        found = sorted(folder.rglob(name))
        if len(found) > 1:
            raise ConfigError(
                f"{folder}: holds {len(found)} {_KINDS[name]}; name one of them:\n  "
                + "\n  ".join(str(path.parent) for path in found)
            )
        if found:
            return found[0]
    raise ConfigError(
        f"{folder}: has no {' and no '.join(names)}, nor do its subfolders; name the folder of a "
        "masked arm (dense arms have no mask)"
    )
