"""How figures are drawn: matplotlib's style, the page's colours, and figures as inline SVG.

The ink, the grid and the tracks are drawn in placeholder colours and exchanged for the page's CSS
variables, so that a figure follows the page, in light and in dark.
"""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
from matplotlib.figure import Figure

INK, GRID, TRACK = "#010203", "#040506", "#070809"
DENSE, SLIM, WARM = "#0a0b0c", "#0d0e0f", "#101112"
PALETTE = tuple(f"#2{i}2{i}2{i}" for i in range(10))
"""One colour per line or provider, ``--p0`` to ``--p9``: for pages that define them."""
_VARIABLES = {
    INK: "var(--ink)",
    GRID: "var(--line)",
    TRACK: "var(--track)",
    DENSE: "var(--dense)",
    SLIM: "var(--slim)",
    WARM: "var(--warm)",
    **{colour: f"var(--p{i})" for i, colour in enumerate(PALETTE)},
}
STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}


def svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an SVG element that takes its colours from the page."""
    out = io.StringIO()
    # Ids of clip paths and markers are hashed with the salt: unique on the page, and repeatable.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(
            out, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = out.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, variable)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(
        r'"(figure|axes|patch|line2d|text|xtick|ytick|matplotlib\.axis|legend|'
        r'PathCollection|LineCollection)_(\d+)"',
        rf'"{name}-\1-\2"',
        text,
    )
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
