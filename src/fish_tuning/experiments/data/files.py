"""Read local tables in the formats that people use, and say where a file is broken."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from fish_tuning.experiments.config.source import DataSource
from fish_tuning.experiments.errors import ConfigError, MissingFileError

_FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "txt",
}


def find_files(path: str | Mapping[str, str], format: str | None = None) -> dict[str, Path]:
    """Find the file of each split.

    Args:
        path: A file (the split `train`), a mapping from split to file, or a folder whose files are
            named after their splits.
        format: The only format to look for in a folder; all of them by default.

    Raises:
        ConfigError: The folder holds no data file, or two files of the same split.
    """
    if not isinstance(path, str):
        return {split: Path(file) for split, file in path.items()}
    root = Path(path)
    if not root.is_dir():
        return {"train": root}
    found: dict[str, Path] = {}
    for file in sorted(root.iterdir()):
        kind = _FORMATS.get(file.suffix.lower())
        if kind is None or format not in (None, kind):
            continue
        if file.stem in found:
            raise ConfigError(
                f"dataset.path: {path!r} holds {found[file.stem].name} and {file.name}; set "
                "dataset.format, or give a mapping of split to file"
            )
        found[file.stem] = file
    if not found:
        raise ConfigError(
            f"dataset.path: {path!r} holds no file ending in {', '.join(_FORMATS)}, and no saved "
            "data set; give a file, or a mapping of split to file"
        )
    return found


def read_file(file: Path, config: DataSource) -> Dataset:
    """Read one file of rows.

    Raises:
        ConfigError: The file cannot be read. The message names the line if it is known.
    """
    kind = config.format or _FORMATS.get(file.suffix.lower())
    if kind is None:
        raise ConfigError(
            f"dataset.path: the ending of {str(file)!r} is not that of a known format; set "
            "dataset.format to csv, tsv, json, jsonl, parquet or txt"
        )
    try:
        if kind == "parquet":
            return _read_parquet(file)
        if kind == "txt" and config.delimiter is None:
            return _read_lines(file)
        if kind in ("csv", "tsv", "txt"):
            return _read_delimited(file, kind, config)
        return _from_rows(_read_json(file, lines=kind == "jsonl"), file)
    except FileNotFoundError:
        raise MissingFileError(
            f"dataset.path: there is no file {str(file)!r}; check the path"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"dataset.path: {str(file)!r} is a folder; name a file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"dataset.path: {str(file)!r} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    except OSError as error:
        raise ConfigError(f"dataset.path: {str(file)!r} cannot be read: {error}") from None


def _read_lines(file: Path) -> Dataset:
    """Read one text per line; empty lines do not count."""
    lines = file.read_text(encoding="utf-8-sig").split("\n")
    return Dataset.from_dict({"text": [line.rstrip("\r") for line in lines if line.strip()]})


def _read_delimited(file: Path, kind: str, config: DataSource) -> Dataset:
    quoting = (kind == "csv") if config.quoting is None else config.quoting
    delimiter = config.delimiter or ("," if kind == "csv" else "\t")
    # newline="\n": a carriage return inside a field does not end the line.
    with file.open(encoding="utf-8-sig", newline="\n") as stream, _long_fields():
        rows = (
            _split_quoted(stream, delimiter, file) if quoting else _split_plain(stream, delimiter)
        )
        names = config.columns
        has_header = (names is None and kind != "txt") if config.header is None else config.header
        first = next(rows, None)
        if first is None:
            raise ConfigError(f"dataset.path: {str(file)!r} is empty; give a file with rows")
        if names is None:
            header = first[1] if has_header else [""] * len(first[1])
            names = [name.strip() or str(i) for i, name in enumerate(header)]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ConfigError(
                f"dataset.path: {str(file)!r} has the column {repeated[0]!r} twice; rename one, "
                "or set dataset.columns (with header: false if there is no header line)"
            )
        columns: list[list[str]] = [[] for _ in names]
        for number, fields in rows if has_header else chain([first], rows):
            if len(fields) != len(names):
                raise ConfigError(
                    f"dataset.path: {str(file)!r}, line {number}: {len(fields)} fields where "
                    f"{len(names)} are expected ({', '.join(names)}); fix the line, or set "
                    "dataset.delimiter, dataset.quoting or dataset.columns"
                )
            for column, field in zip(columns, fields, strict=True):
                column.append(field)
    return Dataset.from_dict(dict(zip(names, columns, strict=True)))


def _split_plain(stream: Iterable[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(stream, start=1):
        line = line.rstrip("\r\n")
        if line:
            yield number, line.split(delimiter)


def _split_quoted(
    stream: Iterable[str], delimiter: str, file: Path
) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    try:
        for fields in reader:
            if fields:
                yield reader.line_num, fields
    except csv.Error as error:
        raise ConfigError(
            f"dataset.path: {str(file)!r}, line {reader.line_num}: {error}; double the "
            "quotation marks inside fields, or set dataset.quoting: false"
        ) from None


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lift the csv module's limit of 131,072 characters per field."""
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_json(file: Path, lines: bool) -> list[Any]:
    text = file.read_text(encoding="utf-8-sig")
    if not lines:
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            # Files of one object per line are often called .json too.
            if error.msg != "Extra data":
                raise ConfigError(
                    f"dataset.path: {str(file)!r}, line {error.lineno}: is not JSON: {error.msg}"
                ) from None
        else:
            return content if isinstance(content, list) else [content]
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ConfigError(
                    f"dataset.path: {str(file)!r}, line {number}: is not JSON: {error.msg}; "
                    "one object per line is expected"
                ) from None
    return rows


def _from_rows(rows: list[Any], file: Path) -> Dataset:
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ConfigError(
                f"dataset.path: {str(file)!r}, row {number}: is a {type(row).__name__}; rows must "
                'be objects such as {"text": "...", "label": 1}'
            )
    names = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_dict({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: list[Any]) -> list[Any]:
    """Return values that fit into an Arrow column: as they are or, if they differ in type, text."""
    try:
        pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return [None if value is None else _as_text(value) for value in values]
    return values


def _as_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)


def _read_parquet(file: Path) -> Dataset:
    try:
        with file.open("rb") as stream:
            table = pq.read_table(stream)
    except pa.ArrowInvalid as error:
        raise ConfigError(f"dataset.path: {str(file)!r} is not a Parquet file: {error}") from None
    for index, field in enumerate(table.schema):
        # pandas writes categories as dictionaries, which datasets does not read.
        if pa.types.is_dictionary(field.type):
            decoded = table.column(index).cast(field.type.value_type)
            table = table.set_column(index, field.name, decoded)
    return Dataset(table)
