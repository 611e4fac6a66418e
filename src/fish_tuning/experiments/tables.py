"""Tables as text, and how they are drawn in Markdown and in a terminal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from html import escape
from typing import TypeVar

from rich.box import HEAVY_HEAD, SIMPLE_HEAD
from rich.table import Table as TerminalTable
from rich.text import Text

MISSING = "n/a"
"""What a table shows where there is no value."""

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
        """Draw the table for a terminal; `total` frames it and sets the last row apart."""
        table = TerminalTable(box=HEAVY_HEAD if total else SIMPLE_HEAD, pad_edge=total)
        for position, header in enumerate(self.headers):
            table.add_column(header, justify="right" if position else "left", overflow="fold")
        for position, row in enumerate(self.rows, start=1):
            if total and position == len(self.rows):
                table.add_section()
            table.add_row(*map(Text, row))
        return table


def markdown_text(text: str) -> str:
    """Escape text for Markdown: it stays on one line and none of it is markup."""
    plain = re.sub(r"([\\`*\[\]|~#$]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))
    return escape(plain, quote=False)
