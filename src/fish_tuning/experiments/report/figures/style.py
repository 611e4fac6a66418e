"""Colors and short texts of figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# Readable on white and on almost black.
COLORS = (
    "#3b7dd8",
    "#d9701e",
    "#2f9e5f",
    "#d6455d",
    "#8b6fd1",
    "#1f9aa8",
    "#a8763e",
    "#c2569b",
)


def color_by_arm(arms: Iterable[str]) -> Mapping[str, str]:
    """Give each arm a color, in the order of their first appearance."""
    names = dict.fromkeys(arms)
    return {arm: COLORS[i % len(COLORS)] for i, arm in enumerate(names)}


def shorten(text: str, limit: int = 30) -> str:
    """Fit text from a file on one line of a figure, without characters that cannot be shown."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
