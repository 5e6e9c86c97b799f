"""The figure of speed results that is drawn: step time against sparsity, a line per provider."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from slimkern.report.drawing import INK, PALETTE, STYLE, svg
from slimkern.report.speed_read import Block

_SPARSITY = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_MARKERS = "osD^vP*Xph"


def sparsity(shape: str) -> float | None:
    """The fraction in a training step's shape, ``16x48, 80%`` -> 0.8; ``None`` without one."""
    found = _SPARSITY.search(shape)
    return float(found.group(1)) / 100 if found else None


def sparsity_lines(blocks: Sequence[Block], colours: Mapping[str, int], name: str) -> str | None:
    """Fastest step time over sparsity, from zero; ``None`` with fewer than two sparsities.

    Args:
        blocks: one work in one precision, at several sparsities.
        colours: the palette's index of each provider.
        name: unique on the page.
    """
    found = [(s, b) for b in blocks if (s := sparsity(b.shape)) is not None]
    placed = sorted(found, key=lambda pair: pair[0])
    if len({at for at, _ in placed}) < 2:
        return None
    with matplotlib.rc_context(STYLE):
        # Small, so that its text stays readable where the page is narrow.
        figure = Figure(figsize=(5.6, 3.5), layout="constrained")
        axes = figure.subplots()
        names = list(dict.fromkeys(n for _, b in placed for n in b.entries))
        ends = []
        for provider in names:
            line = [(s, b.entries[provider].minimum) for s, b in placed if provider in b.entries]
            x, y = [s for s, _ in line], [seconds * 1e3 for _, seconds in line]
            colour = PALETTE[colours[provider]]
            marker = _MARKERS[colours[provider]]
            axes.plot(x, y, color=colour, linewidth=2.2, marker=marker, markersize=6)
            if x[-1] < placed[-1][0]:  # measured at less sparsity only: carried to its name
                axes.plot([x[-1], placed[-1][0]], [y[-1]] * 2, color=colour, linestyle=":")
            ends.append((y[-1], provider, colour))
        floors = [(s, _floor(b)) for s, b in placed if _floor(b)]
        if len(floors) > 1:
            x, y = [s for s, _ in floors], [floor * 1e3 for _, floor in floors]
            axes.plot(x, y, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
            ends.append((y[-1], "the machine's limit", INK))
        axes.set_ylim(bottom=0)
        _label_ends(axes, ends, last=placed[-1][0], first=placed[0][0])
        axes.set_xlabel("removed")
        axes.set_title("ms per step")
        axes.set_xticks(sorted({s for s, _ in placed}))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="x", visible=False)
        return svg(figure, name, f"Step time against sparsity, {placed[0][1].work}")


def _floor(block: Block) -> float:
    """The smallest of the rows' floors: providers may be held to different units."""
    return min((f for e in block.entries.values() if (f := e.row.get("floor", 0.0))), default=0.0)


def _label_ends(
    axes: Axes, ends: Sequence[tuple[float, str, str]], *, last: float, first: float
) -> None:
    """Names at the lines' right ends, moved apart where they would lie on each other."""
    top = axes.get_ylim()[1]
    gap = 0.075 * top
    places: list[float] = []
    ordered = sorted(ends)
    for y, _, _ in ordered:
        places.append(max(y, places[-1] + gap) if places else y)
    for i in reversed(range(len(places))):  # and down again what was pushed out at the top
        places[i] = min(places[i], (places[i + 1] - gap) if i + 1 < len(places) else top)
    width = last - first
    for place, (y, label, colour) in zip(places, ordered):
        axes.plot(
            [last + 0.015 * width, last + 0.05 * width],
            [y, place],
            color=colour,
            linewidth=1,
            clip_on=False,
        )
        axes.text(last + 0.06 * width, place, label, va="center", fontsize=9.5)
    longest = max(len(label) for _, label, _ in ends)
    axes.set_xlim(first - 0.04 * width, last + (0.1 + 0.034 * longest) * width)
