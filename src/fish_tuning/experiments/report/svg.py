"""Figures as elements of an HTML page."""

from __future__ import annotations

import io
import re
from html import escape

from matplotlib.figure import Figure

from fish_tuning.experiments.report.style import GRID, MUTED, TEXT, figure_style

# Custom properties of the page, which its dark theme changes.
_PROPERTIES = {TEXT: "--text", MUTED: "--muted", GRID: "--grid"}


def to_svg(figure: Figure, name: str, description: str) -> str:
    """Return a figure as an `svg` element; text stays text, and the output is deterministic.

    The page's custom properties `--text`, `--muted` and `--grid` set its colors.

    Args:
        figure: A figure in the style of `figure_style`.
        name: Prefix of the ids inside, different for each figure of a page.
        description: What it shows, for readers who cannot see it.
    """
    stream = io.StringIO()
    no_metadata = {"Creator": None, "Date": None, "Format": None, "Type": None}
    with figure_style():
        figure.savefig(stream, format="svg", metadata=no_metadata)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    # The rules of a style element would apply to the whole page.
    svg = re.sub(r"<style\b.*?</style>", "", svg, count=1, flags=re.DOTALL)
    start = svg.index(">") + 1
    view_box = re.search(r'viewBox="[^"]*"', svg[:start])
    width = re.search(r'width="([\d.]+)pt"', svg[:start])
    assert view_box is not None
    assert width is not None
    head = (
        f'<svg {view_box[0]} role="img" aria-label="{escape(description)}" '
        f'style="max-width: {float(width[1]) * 1.7:.0f}px">'
    )
    # Only tags: text may look like a color or an id.
    return head + re.sub(r"<[^>]*>", lambda tag: _adapt(tag[0], name), svg[start:])


def _adapt(tag: str, name: str) -> str:
    """Prefix the ids in a tag and replace its colors with custom properties."""
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = re.sub(r'\bxlink:href="#', f'href="#{name}-', tag)
    tag = tag.replace("url(#", f"url(#{name}-")
    for color, variable in _PROPERTIES.items():
        tag = tag.replace(color, f"var({variable}, {color})")
    return tag
