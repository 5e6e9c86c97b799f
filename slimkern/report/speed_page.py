"""From speed results to one HTML page that needs nothing else: no script, no network, no fonts."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from slimkern.report import speed_panels as panels
from slimkern.report import speed_text as text
from slimkern.report.speed_figures import sparsity_lines
from slimkern.report.speed_panels import Matrix, Panels
from slimkern.report.speed_read import Block, Reading, read
from slimkern.report.speed_schema import Level, SpeedResults
from slimkern.report.speed_tables import skipped_line
from slimkern.timing import Ratio

PAGE_FILE = "speed.html"


@dataclass(frozen=True)
class Card:
    """A figure that is read first."""

    value: str
    label: str
    note: str


@dataclass(frozen=True)
class BarSection:
    """The bars of one level in one precision."""

    title: str
    works: tuple[Panels, ...]
    providers: tuple[tuple[str, int], ...]
    """With their colours, for the key."""


@dataclass(frozen=True)
class TableSection:
    """Tables of one kind: one per precision."""

    title: str
    note: str
    tables: tuple[Matrix, ...]


def write_speed_report(results: SpeedResults, path: str | Path) -> Path:
    """Write the page.

    Args:
        results: what was measured; :mod:`slimkern.report.speed_schema` says in which shape.
        path: a file that ends in ``.html``, or a folder, where ``speed.html`` is written; folders
            are created.

    Returns:
        the path of the page.

    Raises:
        ValueError: the results are malformed; the message names the row and key.
        OSError: the file can't be written.
    """
    page = render_speed(results)
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        path = path / PAGE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(page, encoding="utf-8")
    os.replace(scratch, path)
    return path


def _breakable(name: str) -> Markup:
    """A name as text that may be broken after an underscore, not in the middle of a word."""
    return Markup("_<wbr>").join(name.split("_"))


def render_speed(results: SpeedResults) -> str:
    """The page as text. All text of the results is escaped.

    Raises:
        ValueError: as :func:`write_speed_report`.
    """
    reading = read(results)
    environment = Environment(
        loader=PackageLoader("slimkern.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(ms=text.ms, times=text.times, percent=text.percent)
    environment.filters.update(error=text.error, mb=text.megabytes, duration=text.duration)
    environment.filters["breakable"] = _breakable
    level = _headline(reading)
    return environment.get_template("speed.html.j2").render(
        r=results,
        reading=reading,
        first_line=text.first_line(results),
        level_names=text.LEVEL_NAMES,
        main_titles=[text.PRECISION_NAMES[p] for p in ("fp32", "bf16")],
        cards=_cards(reading, level) if level else [],
        level=level,
        winners=panels.winners(reading, level) if level and _several(reading, level) else [],
        key=list(panels.colours(reading, level).items()) if level else [],
        bars=_bars(reading),
        lines=_lines(reading),
        tables=_ratio_tables(reading),
        reached=_reached_tables(reading),
        costs=_costs(reading, level) if level else [],
        bounds=reading.bounds,
        bounds_text=(text.BOUNDS_TITLE, text.BOUNDS_NOTE),
        skipped=[skipped_line(s) for s in reading.skipped],
        limits=[(x["name"], text.peak(x["value"], x["unit"])) for x in results.get("limits") or ()],
    )


def _headline(reading: Reading) -> Level | None:
    """The level that is shown first and largest: models, or the nearest to them."""
    return next((level for level in text.LEVEL_NAMES if level in reading.levels), None)


def _several(reading: Reading, level: Level) -> bool:
    """More than one piece of work: else the bars alone tell who is fastest where."""
    return len({b.work for b in reading.of(level)}) > 1


def _cards(reading: Reading, level: Level) -> list[Card]:
    """Who is fastest, by how much slimkern leads or trails, how far the limit is."""
    cards = _own_model_cards(reading, level)
    for precision in (p for p in reading.precisions(level) if p in ("fp32", "bf16")):
        blocks = [b for b in reading.of(level, precision) if b.fastest]
        name = text.PRECISION_NAMES[precision]
        first = [b.fastest.provider for b in blocks if b.fastest]
        if not first or {b.base for b in blocks} == {"dense"}:
            continue
        most = max(dict.fromkeys(first), key=first.count)
        note = _lead(blocks, most)
        label = f"fastest in {first.count(most)} of {text.plural(len(first), 'case')}, {name}"
        cards.append(Card(most, label, note))
        ratios = [r for b in blocks if (r := b.own_against_peers)]
        if ratios and any(p.startswith("slimkern") for b in blocks for p in b.entries):
            cards.append(_own_card(ratios, name))
    shares = [b.fastest.reached for b in reading.of(level) if b.fastest and b.fastest.reached]
    if shares:
        middle = f"half of the cases above {text.percent(statistics.median(shares))}"
        label = "of the machine's limit, by whoever is fastest"
        cards.append(Card(_span(min(shares), max(shares), text.percent), label, middle))
    return cards


def _own_model_cards(reading: Reading, level: Level) -> list[Card]:
    """A user's own bench: each model against the dense one, over the shapes."""
    cards = []
    for precision in reading.precisions(level):
        blocks = [b for b in reading.of(level, precision) if b.base == "dense"]
        for provider in reading.providers_of(blocks):
            own = [b.entries[provider] for b in blocks if provider in b.entries]
            ratios = [e.ratio.median for e in own if e.ratio is not None]
            if ratios:
                value = _span(min(ratios), max(ratios), text.times)
                note = (
                    f"over {text.plural(len(ratios), 'shape')}, {text.PRECISION_NAMES[precision]}"
                )
                cards.append(Card(value, f"as fast as dense: {provider}", note))
    return cards


def _lead(blocks: Sequence[Block], provider: str) -> str:
    """``median 1.45× torch eager``."""
    entries = [b.entries[provider] for b in blocks if provider in b.entries]
    ratios = [e.ratio.median for e in entries if e.ratio is not None]
    bases = list(dict.fromkeys(b.base for b in blocks if b.base))
    if not ratios or not bases:
        return ""
    return f"{text.times(statistics.median(ratios))} as fast as {' or '.join(bases)} (median)"


def _own_card(ratios: Sequence[Ratio], precision: str) -> Card:
    medians = [r.median for r in ratios]
    value = text.times(statistics.median(medians))
    note = f"{_span(min(medians), max(medians), text.times)} over {len(medians)} cases"
    return Card(value, f"slimkern against the best peer, {precision}, median", note)


def _span(low: float, high: float, show: object) -> str:
    assert callable(show)
    first, last = show(low), show(high)
    return first if first == last else f"{first} {text.RANGE} {last}"


def _bars(reading: Reading) -> list[BarSection]:
    """Models as bars, each precision for itself."""
    sections = []
    palette = panels.colours(reading, "model")
    for precision in reading.precisions("model"):
        names = reading.providers_of(reading.of("model", precision))
        works = tuple(panels.bar_panels(reading, "model", precision))
        key = tuple((name, palette[name]) for name in names)
        sections.append(BarSection(text.PRECISION_NAMES[precision], works, key))
    return sections


def _lines(reading: Reading) -> list[tuple[str, Markup]]:
    """(title, figure) of every training work and precision with several sparsities."""
    palette = panels.colours(reading, "training")
    found: list[tuple[str, Markup]] = []
    for precision in reading.precisions("training"):
        for work, blocks in panels.by_work(reading.of("training", precision)):
            drawn = sparsity_lines(blocks, palette, f"lines{len(found)}")
            if drawn is not None:
                found.append((f"{work}, {text.PRECISION_NAMES[precision]}", Markup(drawn)))
    return found


def _ratio_tables(reading: Reading) -> list[TableSection]:
    """Layers, operations and training steps: ratios to the base."""
    sections = []
    for level in text.LEVEL_NAMES:
        if level == "model" or level not in reading.levels:
            continue
        bases = list(dict.fromkeys(b.base for b in reading.of(level) if b.base))
        note = (
            f"How many times as fast as {' or '.join(bases)} in the same rounds (median), and the "
            "fastest round in milliseconds. Green is faster, orange slower; framed: the fastest."
            if bases
            else "The fastest round in milliseconds; framed: the fastest."
        )
        tables = [panels.ratio_matrix(reading, level, p) for p in reading.precisions(level)]
        sections.append(TableSection(text.LEVEL_NAMES[level], note, tuple(tables)))
    return sections


def _reached_tables(reading: Reading) -> list[TableSection]:
    sections = []
    for level in text.LEVEL_NAMES:
        if level not in reading.levels:
            continue
        found = [panels.reached_matrix(reading, level, p) for p in reading.precisions(level)]
        tables = tuple(table for table in found if table is not None)
        if tables:
            sections.append(TableSection(text.LEVEL_NAMES[level], "", tables))
    return sections


def _costs(reading: Reading, level: Level) -> list[TableSection]:
    sections = []
    for title, key, show in (
        ("First call: load, pack, compile, warm up", "first_call", text.duration),
        ("Peak memory above what the process held", "peak_bytes", text.megabytes),
    ):
        found = [
            panels.cost_matrix(reading, level, precision, key, show)
            for precision in reading.precisions(level)
        ]
        tables = tuple(table for table in found if table is not None)
        if tables:
            sections.append(TableSection(title, "", tables))
    return sections


__all__ = ["PAGE_FILE", "render_speed", "write_speed_report"]
