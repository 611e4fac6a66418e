"""The look of figures, and figures as elements of an HTML page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib.style
from matplotlib.figure import Figure

# The light theme; to_svg makes custom properties of them, which a page's dark theme changes.
TEXT = "#1f2328"
MUTED = "#59636f"
GRID = "#d1d9e1"
_PROPERTIES = {TEXT: "--text", MUTED: "--muted", GRID: "--grid"}

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
    # Names from files may hold dollar signs.
    "text.parse_math": False,
}


@contextmanager
def figure_style() -> Iterator[None]:
    """Make and save figures in this: the same look whatever the user's own settings."""
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        # Only the layout needs the font's own glyphs; browsers have others.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


def to_svg(figure: Figure, name: str, description: str) -> str:
    """Return a figure as an element for an HTML page: text as text, same figure, same bytes.

    The page's custom properties `--text`, `--muted` and `--grid` set its colours.

    Args:
        figure: One of this module's.
        name: Prefix of the ids inside, unlike those of the page's other figures.
        description: What it shows, for those who do not see it.
    """
    stream = io.StringIO()
    nothing = {"Creator": None, "Date": None, "Format": None, "Type": None}
    with figure_style():
        figure.savefig(stream, format="svg", metadata=nothing)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    # Its rules would hold for the whole page.
    svg = re.sub(r"<style\b.*?</style>", "", svg, count=1, flags=re.DOTALL)
    start = svg.index(">") + 1
    view_box = re.search(r'viewBox="[^"]*"', svg[:start])
    assert view_box is not None
    width = re.search(r'width="([\d.]+)pt"', svg[:start])
    assert width is not None
    head = (
        f'<svg {view_box[0]} role="img" aria-label="{escape(description)}" '
        f'style="max-width: {float(width[1]) * 1.7:.0f}px">'
    )
    # Tags only: an arm may be called like a colour or an id.
    return head + re.sub(r"<[^>]*>", lambda tag: _adapt(tag[0], name), svg[start:])


def _adapt(tag: str, name: str) -> str:
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = re.sub(r'\bxlink:href="#', f'href="#{name}-', tag)
    tag = tag.replace("url(#", f"url(#{name}-")
    for color, variable in _PROPERTIES.items():
        tag = tag.replace(color, f"var({variable}, {color})")
    return tag


def shorten(text: str, limit: int = 30) -> str:
    """Text from a file on one line of a figure, without what XML cannot hold."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
