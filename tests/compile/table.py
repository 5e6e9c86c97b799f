"""The figures of every kernel as markdown: registers, shared memory, the main loop by kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tests.compile.matrix import Row
from tests.compile.targets import TARGETS

KINDS = (
    "matrix",
    "float",
    "global load",
    "shared memory",
    "address",
    "conversion",
    "move",
    "wait",
    "branch",
)


def table(rows: Sequence[Row], target: str) -> str:
    """A line per kernel, dtype and tile: the first case of each that was compiled."""
    header = ["kernel", "dtype", "tile", "warps", "registers", "shared KiB", "blocks per SM"]
    header += [f"loop: {kind}" for kind in KINDS] + ["16-byte loads", "matrix instruction"]
    lines = [f"| {' | '.join(header)} |", "|---|---|---|" + "---:|" * (len(header) - 4) + "---|"]
    for row in _distinct(row for row in rows if row.target == target and row.figures):
        lines.append(f"| {' | '.join(_cells(row))} |")
    return "\n".join(lines) + "\n"


def _distinct(rows: Iterable[Row]) -> list[Row]:
    first: dict[tuple, Row] = {}
    for row in rows:
        first.setdefault((row.kernel, row.dtype, *row.blocks().values()), row)
    return sorted(first.values(), key=lambda row: (row.kernel, row.dtype))


def _cells(row: Row) -> list[str]:
    figures = row.figures
    assert figures is not None
    blocks = TARGETS[row.target].blocks(figures.registers, figures.shared, figures.warps)
    loads = sum(figures.loads.values())
    wide = sum(count for size, count in figures.loads.items() if size >= 16)
    return [
        f"`{row.kernel.strip('_').removesuffix('_kernel')}`",
        row.dtype,
        "x".join(map(str, row.blocks().values())),
        str(figures.warps),
        str(figures.registers),
        f"{figures.shared / 1024:.0f}",
        str(blocks),
        *(str(figures.loop.get(kind, 0)) for kind in KINDS),
        "TMA" if figures.tma else f"{wide} of {loads}",
        ", ".join(sorted({opcode.split(".")[0] for opcode in figures.matrix})) or "none",
    ]
