"""Where data comes from: a hub data set, local files, or what is installed anyway."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from fish_tuning.experiments.config.sections import Section
from fish_tuning.experiments.config.values import NameList, Names, Text

INSTALLED_TEXT = "installed_text"
"""The `name` of sentences from the documentation of installed packages."""

INSTALLED_DATA = (INSTALLED_TEXT, "installed_docstrings", "python_reference")
"""Every `name` of data that is made from what is installed."""


class DataSource(Section):
    """Where data comes from, and how its files are read."""

    name: Text | None = Field(
        default=None,
        description="Name for reports; a GLUE task's name also chooses its metric and columns. "
        "Alone, it can be the data of installed packages: `installed_text` (sentences of their "
        "documentation, labeled by package), `installed_docstrings` (a signature as prompt, its "
        "documentation as completion) or `python_reference` (paragraphs of Python's manual).",
    )
    load_args: NameList | None = Field(
        default=None, description='Arguments of datasets.load_dataset, such as ["glue", "mrpc"].'
    )
    path: Text | dict[str, str] | None = Field(
        default=None,
        description="Local data, relative to the current folder: a file, a mapping of split to "
        "file, a folder that holds train.* and dev.* or validation.*, or a folder written by "
        "save_to_disk.",
    )
    format: Literal["csv", "tsv", "json", "jsonl", "parquet", "txt"] | None = Field(
        default=None, description="Format of local files; by default the one of their extension."
    )
    columns: Names | None = Field(
        default=None,
        description="Column names of CSV, TSV and TXT files that have no header line.",
    )
    header: bool | None = Field(
        default=None,
        description="Whether CSV and TSV files start with a header line; by default they do unless "
        "`columns` is given. Without both, columns are named 0, 1, 2...",
    )
    delimiter: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="Delimiter of CSV, TSV and TXT files; by default a comma, a tab, or none: "
        "every line of a TXT file is then one `text`. One character where fields are quoted.",
    )
    quoting: bool | None = Field(
        default=None,
        description="Whether quotation marks enclose fields; by default in CSV only.",
    )

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Keys that exclude each other, or are for other kinds of files."""
        yield from super().conflicts()
        if self.load_args is not None and self.path is not None:
            yield "path", "is given beside load_args; keep one and set the other to null"
        if self.load_args is None and self.path is None and self.name not in INSTALLED_DATA:
            yield (
                "load_args",
                f"names no data; give load_args, path, or name: {' or '.join(INSTALLED_DATA)}",
            )
        if self.path is None:
            for key in ("format", "columns", "header", "delimiter", "quoting"):
                if getattr(self, key) is not None:
                    yield key, "is for local files and path is not given; remove it"
        if self.delimiter is not None and len(self.delimiter) > 1 and self.quoting:
            yield "delimiter", f"{self.delimiter!r} needs quoting: false; quoted fields take one"
