"""The look of figures."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import matplotlib.style

# Colors of the light theme. The HTML report replaces them in its dark theme.
TEXT = "#1f2328"
MUTED = "#59636f"
GRID = "#d1d9e1"

# Inches of 72 SVG units. Narrow, so that text stays readable on a phone.
WIDTH = 4.7

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

_STYLE: dict[str, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "auto",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "legend.fontsize": 9.5,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.titlecolor": TEXT,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "fish-tuning",
    # Names from files may contain dollar signs.
    "text.parse_math": False,
}


@contextmanager
def figure_style() -> Iterator[None]:
    """Draw and save figures in our style, whatever the user's own settings."""
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        # Matplotlib needs the font only to lay out the text: browsers have fonts of their own.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


def color_by_arm(arms: Iterable[str]) -> Mapping[str, str]:
    """Give each arm a color, in the order of their first appearance."""
    names = dict.fromkeys(arms)
    return {arm: COLORS[i % len(COLORS)] for i, arm in enumerate(names)}


def shorten(text: str, limit: int = 30) -> str:
    """Fit text from a file on one line of a figure, without characters that XML cannot hold."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def compact(value: float) -> str:
    """Write a count in few characters: 28,418 is 28.4k."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"
