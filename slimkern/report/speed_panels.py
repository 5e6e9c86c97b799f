"""What the speed page shows, as plain values for its template: bars, tables with bars, cards."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slimkern.report import speed_text as text
from slimkern.report.speed_read import Block, Entry, Reading, is_own
from slimkern.report.speed_schema import Level, Precision

BASE_COLOUR = 4  # of the palette
OWN_COLOURS = (0, 1, 2, 3, 9, 8, 7, 6, 5)  # slimkern's own are kin, as long as there are few
PEER_COLOURS = (5, 6, 7, 8, 9, 3, 2, 1, 0)
HOTTEST = 66.0  # percent of colour behind text that must stay readable
OUTLIER = 4.0  # times the median: a bar beyond it is cut, so that the others can be told apart


@dataclass(frozen=True)
class Bar:
    """A provider's bar in a panel; ``width`` and ``floor`` in percent of the panel."""

    provider: str
    colour: int
    time: str
    ratio: str
    width: float
    cut: bool
    """It is longer than the panel."""
    floor: float | None
    fastest: bool
    why: str
    """Why there are no times (empty: there are), or the interval of the ratio."""
    failed: bool


@dataclass(frozen=True)
class Panel:
    """One shape of one work: a bar per provider, on a scale of its own."""

    shape: str
    bars: tuple[Bar, ...]
    note: str


@dataclass(frozen=True)
class Panels:
    """One work in one precision: panels side by side, the same providers in the same places."""

    work: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Cell:
    """A cell of a matrix. ``bar`` in percent; ``heat``: how much colour,
    in percent, below zero for slow."""

    text: str = text.NONE
    sub: str = ""
    bar: float | None = None
    heat: float | None = None
    best: bool = False
    colour: int | None = None
    why: str = ""
    failed: bool = False


@dataclass(frozen=True)
class Line:
    """A line of a matrix; ``group`` only where it is not that of the line above."""

    group: str
    label: str
    cells: tuple[Cell, ...]
    end: str = ""


@dataclass(frozen=True)
class Matrix:
    """A table of cells: a column per provider (or per shape)."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    end: str = ""
    lead: str = "shape"


def colours(reading: Reading, level: Level) -> dict[str, int]:
    """Each provider's colour of the palette: the same for all levels but training.

    Training steps have providers of their own, and would use the colours up.
    """
    training = level == "training"
    names = reading.providers_of(
        [b for b in reading.blocks if (b.level == "training") == training],
    )
    base = [p for p in names[:1] if not is_own(p)]
    own = [p for p in reversed(names) if is_own(p)]
    peers = [p for p in names if p not in own and p not in base]
    found = dict.fromkeys(base, BASE_COLOUR)
    for group, wanted in ((own, OWN_COLOURS), (peers, PEER_COLOURS)):
        free = [c for c in wanted if c not in found.values()] or list(wanted)
        found |= {name: free[i % len(free)] for i, name in enumerate(group)}
    return {name: found[name] for name in names}


def bar_panels(reading: Reading, level: Level, precision: Precision) -> list[Panels]:
    """Bars per shape, providers grouped, a row of panels per work."""
    palette = colours(reading, level)
    found = []
    for work, blocks in by_work(reading.of(level, precision)):
        names = reading.providers_of(blocks)
        panels = tuple(_panel(block, names, palette) for block in blocks)
        found.append(Panels(work, panels))
    return found


def by_work(blocks: Sequence[Block]) -> list[tuple[str, list[Block]]]:
    """The blocks of each work, in the order of the run."""
    works: dict[str, list[Block]] = {}
    for block in blocks:
        works.setdefault(block.work, []).append(block)
    return list(works.items())


def _panel(block: Block, names: Sequence[str], palette: dict[str, int]) -> Panel:
    times = [e.minimum for e in block.entries.values()]
    within = [t for t in times if t <= OUTLIER * statistics.median(times)]
    most = max(within, default=1.0)
    bars = []
    for name in names:
        entry = block.entries.get(name)
        floor = entry.row.get("floor", 0.0) if entry else 0.0
        kind, why = block.absent.get(name, ("", ""))
        bars.append(
            Bar(
                provider=name,
                colour=palette[name],
                time=text.ms(entry.minimum) if entry else "",
                ratio=_ratio(block, entry),
                width=round(min(100.0, 100 * entry.minimum / most), 1) if entry else 0.0,
                cut=entry is not None and entry.minimum > most,
                floor=round(min(100.0, 100 * floor / most), 1) if floor else None,
                fastest=entry is not None and entry is block.fastest,
                why=_interval(entry) if entry else why or "not in this run",
                failed=kind == "failed",
            )
        )
    return Panel(block.shape, tuple(bars), _limit_note(block))


def _ratio(block: Block, entry: Entry | None) -> str:
    if entry is None:
        return ""
    if entry.ratio is None:
        return "base" if entry.provider == block.base else ""
    return text.times(entry.ratio.median)


def _interval(entry: Entry) -> str:
    if entry.ratio is None:
        return ""
    r = entry.ratio
    return f"{text.times(r.low)} to {text.times(r.high)} at {r.level:.1%}"


def _limit_note(block: Block) -> str:
    best = block.fastest
    if best is None or best.reached is None:
        return ""
    reached, floor = text.percent(best.reached), text.ms(best.row["floor"])
    return f"{best.row.get('limit', 'limit')}: {floor} ms, {reached} reached"


def winners(reading: Reading, level: Level) -> list[Matrix]:
    """Who is fastest where: works by shapes, a table per precision."""
    palette = colours(reading, level)
    found = []
    for precision in reading.precisions(level):
        blocks = reading.of(level, precision)
        shapes = tuple(dict.fromkeys(b.shape for b in blocks))
        lines = []
        for work, own in by_work(blocks):
            by_shape = {b.shape: b for b in own}
            cells = tuple(_winner(by_shape.get(shape), palette) for shape in shapes)
            lines.append(Line(work, "", cells))
        title = text.PRECISION_NAMES[precision]
        found.append(Matrix(title, shapes, tuple(lines), lead="model"))
    return found


def _winner(block: Block | None, palette: dict[str, int]) -> Cell:
    best = block.fastest if block else None
    if block is None or best is None:
        return Cell()
    parts = []
    if best.ratio is not None:
        parts.append(text.times(best.ratio.median))
    if best.reached is not None:
        parts.append(text.percent(best.reached))
    sub = " · ".join(parts) or f"{text.ms(best.minimum)} ms"
    return Cell(best.provider, sub, colour=palette[best.provider])


def ratio_matrix(reading: Reading, level: Level, precision: Precision) -> Matrix:
    """Times over the base's, a line per work and shape, a column per provider."""

    def cell(block: Block, entry: Entry) -> Cell:
        time = f"{text.ms(entry.minimum)} ms"
        best = entry is block.fastest
        if entry.ratio is None:
            return Cell(time, "base" if entry.provider == block.base else "", best=best)
        heat = max(-HOTTEST, min(HOTTEST, 30 * math.log2(entry.ratio.median)))
        ratio = text.times(entry.ratio.median)
        return Cell(ratio, time, heat=round(heat), best=best, why=_interval(entry))

    return _matrix(reading, level, precision, cell, end="", ends=lambda _: "")


def reached_matrix(reading: Reading, level: Level, precision: Precision) -> Matrix | None:
    """The fraction of the machine's limit; ``None`` where no limit is known."""
    if not any(e.reached for b in reading.of(level, precision) for e in b.entries.values()):
        return None

    def cell(block: Block, entry: Entry) -> Cell:
        if entry.reached is None:
            return Cell()
        share, limit = entry.reached, entry.row.get("limit", "")
        bar = round(min(100.0, 100 * share), 1)
        return Cell(text.percent(share), bar=bar, best=entry is block.fastest, why=limit)

    return _matrix(reading, level, precision, cell, end="limit", ends=_limits)


def _limits(block: Block) -> str:
    found = dict.fromkeys(e.row.get("limit", "") for e in block.entries.values())
    return ", ".join(limit for limit in found if limit)


def cost_matrix(
    reading: Reading, level: Level, precision: Precision, key: str, show: Callable[[float], str]
) -> Matrix | None:
    """``first_call`` or ``peak_bytes`` of the first shape of every work; ``None`` without any."""
    first = {work: blocks[0].case for work, blocks in by_work(reading.of(level, precision))}
    values = {
        (b.case, e.provider): float(value)
        for b in reading.of(level, precision)
        for e in b.entries.values()
        if first[b.work] == b.case and isinstance(value := e.row.get(key), (int, float))
    }
    if not values:
        return None

    def cell(block: Block, entry: Entry) -> Cell:
        value = values.get((block.case, entry.provider))
        if value is None:
            return Cell()
        row = [v for (case, _), v in values.items() if case == block.case]
        bar = round(100 * value / (max(row) or 1.0), 1)
        return Cell(show(value), bar=bar, best=value == min(row))

    whole = _matrix(reading, level, precision, cell, end="", ends=lambda _: "")
    kept = [
        Line("", f"{block.work}, {block.shape}", line.cells)
        for block, line in zip(reading.of(level, precision), whole.lines)
        if block.case == first[block.work]
    ]
    return Matrix(whole.title, whole.columns, tuple(kept), lead="work")


def _matrix(
    reading: Reading,
    level: Level,
    precision: Precision,
    cell: Callable[[Block, Entry], Cell],
    *,
    end: str,
    ends: Callable[[Block], str],
) -> Matrix:
    blocks = reading.of(level, precision)
    names = reading.providers_of(blocks)
    lines, work = [], ""
    for block in blocks:
        cells = []
        for name in names:
            entry = block.entries.get(name)
            kind, why = block.absent.get(name, ("", ""))
            empty = Cell("wrong" if kind == "failed" else text.NONE, why=why)
            cells.append(cell(block, entry) if entry else empty)
        group = block.work if block.work != work else ""
        work = block.work
        lines.append(Line(group, block.shape, tuple(cells), ends(block)))
    return Matrix(text.PRECISION_NAMES[precision], tuple(names), tuple(lines), end)
