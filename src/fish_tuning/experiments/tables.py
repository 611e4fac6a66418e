"""Tables as text, and how they are drawn in Markdown and in a terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal, TypeVar

from rich.box import HEAVY_HEAD, SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

MISSING = "n/a"
"""What a table shows where there is no value."""

_LONGEST_NAME = 32
"""Width of a terminal's first column, in which longer names are wrapped."""

T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """Headers and cells as text.

    Cells may hold anything that a results file holds, so whatever draws them escapes them.
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, items: Iterable[T], columns: Mapping[str, Callable[[T], str]]) -> Table:
        """Make a row for each item: columns map a header to what it shows of an item."""
        rows = tuple(tuple(show(item) for show in columns.values()) for item in items)
        return cls(tuple(columns), rows)

    def markdown(self, *, escape: Callable[[str], str] | None = None, numbers: bool = True) -> str:
        """Draw the table in Markdown.

        Args:
            escape: Turns a cell into Markdown; by default `markdown_text`.
            numbers: Whether the columns after the first hold numbers, which are right-aligned.
        """
        show = escape or markdown_text
        rule = ["---", *["---:" if numbers else "---"] * (len(self.headers) - 1)]
        lines = [map(show, self.headers), rule, *(map(show, row) for row in self.rows)]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)

    def terminal(self, *, total: bool = False) -> TerminalTable:
        """Draw the table for a terminal; `total` frames it and sets the last row apart.

        Columns that do not fit follow below, each time with the first one before them.
        """
        return TerminalTable(self, total)


@dataclass(frozen=True)
class TerminalTable:
    """A table as rich draws it, in as many parts as the terminal's width requires."""

    table: Table
    total: bool

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the parts one below the other."""
        for columns in self._parts(options.max_width):
            yield self._part(columns)

    def _parts(self, available: int) -> Iterator[list[int]]:
        """The columns of each part: the first column, and as many others as fit beside it."""
        first, *widths = map(self._width, range(len(self.table.headers)))
        padding, edges = 3, 4 if self.total else 2
        part, used = [0], first + edges
        for position, width in enumerate(widths, start=1):
            if len(part) > 1 and used + padding + width > available:
                yield part
                part, used = [0], first + edges
            part.append(position)
            used += padding + width
        yield part

    def _width(self, position: int) -> int:
        words = [cell_len(word) for word in self.table.headers[position].split()]
        cells = [cell_len(row[position]) for row in self.table.rows]
        width = max([*words, *cells], default=0)
        return min(width, _LONGEST_NAME) if position == 0 else width

    def _part(self, columns: Sequence[int]) -> RichTable:
        drawn = RichTable(box=HEAVY_HEAD if self.total else SIMPLE_HEAD, pad_edge=self.total)
        for position in columns:
            justify: Literal["left", "right"] = "right" if position else "left"
            header = Text(self.table.headers[position])
            width = self._width(position)
            drawn.add_column(header, justify=justify, overflow="fold", width=width)
        for number, row in enumerate(self.table.rows, start=1):
            if self.total and number == len(self.table.rows):
                drawn.add_section()
            drawn.add_row(*(Text(row[position]) for position in columns))
        return drawn


def markdown_text(text: str) -> str:
    """Escape text for Markdown: it stays on one line and none of it is markup."""
    plain = re.sub(r"([\\`*\[\]|~#$]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))
    return escape(plain, quote=False)
