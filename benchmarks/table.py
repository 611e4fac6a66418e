"""Rows of results: a figure, what it is measured against, a goal; as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import HIGH, LOW, Rounds, Spread

BETWEEN_RUNS = 0.05
"""How far a median may lie beyond the spread of another run, as a fraction of that run's median.
Processes differ in ways that the rounds of one do not show, such as where their memory lies."""


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        case: What is measured.
        against: What it is measured against; empty for a figure that stands alone.
        figure: The absolute figures, in words.
        ratio: The figure over that of `against`, or the figure itself, with its spread.
        at_most: The goal, where a low `ratio` is good.
        at_least: The goal, where a high `ratio` is good.
        unit: Unit of `ratio`; "x" for a ratio.
        rest: What accounts for a missed goal.
    """

    case: str
    against: str
    figure: str
    ratio: Spread
    at_most: float | None = None
    at_least: float | None = None
    unit: str = "x"
    rest: str = ""

    @property
    def verdict(self) -> str:
        """Whether the median meets the goal; if not, whether the goal lies within the spread."""
        if self.at_most is None and self.at_least is None:
            return "-"
        if self.at_most is not None:
            goal, kept = self.at_most, self.ratio.median <= self.at_most
        else:
            assert self.at_least is not None
            goal, kept = self.at_least, self.ratio.median >= self.at_least
        if kept:
            return "met"
        return "within spread" if self.ratio.low <= goal <= self.ratio.high else "missed"

    @property
    def goal(self) -> str:
        """The goal in words."""
        if self.at_most is not None:
            return f"at most {_number(self.at_most)}{self.unit}"
        return "-" if self.at_least is None else f"at least {_number(self.at_least)}{self.unit}"

    def cells(self) -> list[str]:
        """The row of the table."""
        low, high = _number(self.ratio.low), _number(self.ratio.high)
        spread = "" if low == high else f" ({low} to {high})"
        return [
            self.case,
            self.against or "-",
            self.figure,
            f"{_number(self.ratio.median)}{self.unit}{spread}",
            self.goal,
            self.verdict,
        ]


def timed(case: str, rounds: Rounds, name: str, other: str, **goal: Any) -> Row:
    """The row of one contender's time over another's."""
    return Row(
        case=f"{case}: {name}",
        against=other,
        figure=f"{seconds(rounds.median(name))} against {seconds(rounds.median(other))}",
        ratio=Spread.of(rounds.ratios(name, other)),
        **goal,
    )


def exact(value: float) -> Spread:
    """A figure without a spread: a count, or bytes that are the same in every run."""
    return Spread(value, value, value)


def seconds(value: float) -> str:
    """Seconds with a unit that fits."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def megabytes(value: float) -> str:
    """Bytes in MB, 10^6 bytes."""
    return f"{value / 1e6:,.1f} MB"


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"


@dataclass
class Results:
    """A run of the suite: where it took place, and its rows."""

    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Writes JSON, and beside it the table in Markdown."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(self.markdown(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Results:
        """Reads what `save` wrote."""
        record = json.loads(path.read_text(encoding="utf-8"))
        rows = [Row(**{**row, "ratio": Spread(**row["ratio"])}) for row in record["rows"]]
        return cls(record["environment"], rows)

    def markdown(self) -> str:
        """The whole table, and what accounts for missed goals."""
        place = self.environment
        packages = ", ".join(f"{name} {number}" for name, number in place["versions"].items())
        lines = [
            f"# Results on {place['device']}",
            "",
            f"{packages}. {place['threads']} threads.",
            "",
            f"Ratios are medians over rounds in which all contenders take turns; in brackets, "
            f"where {HIGH - LOW:.0%} of the rounds lie. A figure without brackets is a count. "
            f"Another run may lie {BETWEEN_RUNS:.0%} beyond the brackets.",
            "",
            *table(self.rows),
        ]
        missed = [row for row in self.rows if row.verdict in ("missed", "within spread")]
        if missed:
            lines += ["", "## Goals that the median misses", ""]
            lines += [f"- **{row.case}** ({row.cells()[3]}): {row.rest}" for row in missed]
        return "\n".join(lines) + "\n"

    def agreement(self, earlier: Results) -> list[str]:
        """What lies more than BETWEEN_RUNS beyond the spread of an earlier run, in words."""
        before = {(row.case, row.against): row.ratio for row in earlier.rows}
        return [
            f"{row.case} against {row.against or 'nothing'}: {row.ratio.median:.3f} now, "
            f"{spread.low:.3f} to {spread.high:.3f} before"
            for row in self.rows
            if (spread := before.get((row.case, row.against))) and not _agrees(row.ratio, spread)
        ]


def _agrees(spread: Spread, earlier: Spread) -> bool:
    margin = BETWEEN_RUNS * abs(earlier.median)
    return earlier.low - margin <= spread.median <= earlier.high + margin


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of a Markdown table."""
    head = ["case", "against", "figure", "ratio", "goal", "goal met"]
    return [
        "| " + " | ".join(cells) + " |"
        for cells in (head, ["---"] * len(head), *(row.cells() for row in rows))
    ]
