"""The results of ``slimkern bench`` in the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from slimkern.report.speed_schema import ModelSize, SpeedResults, SpeedRow
from slimkern.timing import Ratio, ratio

_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


def show(line: str, results: SpeedResults) -> None:
    """Print where it was measured, the models, the times, what else was seen, and the notes.

    Args:
        line: machine, threads, versions and date.
        results: of the run.
    """
    console = Console(highlight=False)
    console.print(escape(line), soft_wrap=True)
    rows = results["rows"]
    for table in (models(results["models"]), times(rows), besides(rows)):
        console.print(table)
    for row in rows:
        if "failed" in row:
            said = escape(f"{row['shape']} {row['provider']}: {row['failed']}; not timed")
            console.print(f"[bold red]wrong[/]  {said}", soft_wrap=True)
    for note in results["notes"]:
        console.print(escape(note), soft_wrap=True)


def models(sizes: Mapping[str, ModelSize]) -> Table:
    """Parameters and bytes of each model."""
    table = _table(["model"], ["parameters", "without embeddings", "weights"])
    for name, known in sizes.items():
        counts = (f"{known['parameters']:,}", f"{known['layer_parameters']:,}")
        table.add_row(name, *counts, size(known["weight_bytes"]))
    return table


def times(rows: Sequence[SpeedRow]) -> Table:
    """The times of every shape and model, and how they compare with the dense model's."""
    faster = _speedups(rows)
    heads = ["fastest", "median"]
    if faster:
        level = next(iter(faster.values())).level
        heads += ["against dense", f"{100 * level:.0f} % interval"]
    table = _table(["shape", "model"], heads)
    for row, shape in _by_shape(table, rows):
        cells = ["wrong"]
        if "failed" not in row:
            cells = [duration(min(row["seconds"])), duration(statistics.median(row["seconds"]))]
        found = faster.get((row["case"], row["provider"]))
        if found is not None:
            cells += [f"[bold]{found.median:.2f}x[/]", f"{found.low:.2f} .. {found.high:.2f}"]
        table.add_row(shape, row["provider"], *cells)
    return table


def _speedups(rows: Sequence[SpeedRow]) -> dict[tuple[str, str], Ratio]:
    """(case, model) -> how many times as fast as the dense model, where both were timed."""
    timed = [row for row in rows if "seconds" in row]
    dense = {row["case"]: row["seconds"] for row in timed if row["provider"] == "dense"}
    return {
        (row["case"], row["provider"]): ratio(dense[row["case"]], row["seconds"])
        for row in timed
        if row["provider"] != "dense" and row["case"] in dense
    }


def besides(rows: Sequence[SpeedRow]) -> Table:
    """First call, memory and error of every shape and model."""
    table = _table(["shape", "model"], ["first call", "peak memory", "error", "at most"])
    for row, shape in _by_shape(table, rows):
        memory = f"+{size(row['peak_bytes'])}" if "peak_bytes" in row else "unknown"
        error = f"{row['error']:.1e}" if "error" in row else ""
        cells = [duration(row["first_call"]), memory, error, f"{row['bound']:.1e}"]
        table.add_row(shape, row["provider"], *cells)
    return table


def _table(left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _by_shape(table: Table, rows: Sequence[SpeedRow]) -> Iterator[tuple[SpeedRow, str]]:
    """Each row, and its shape where it is the first of that shape."""
    several = len({row["provider"] for row in rows}) > 1
    for before, row in zip([None, *rows], rows):
        first = before is None or before["shape"] != row["shape"]
        if first and before is not None and several:
            table.add_section()
        yield row, row["shape"] if first else ""


def duration(seconds: float) -> str:
    """Milliseconds, or seconds from ten on, with three digits that count."""
    if seconds >= 10:
        return f"{seconds:.1f} s"
    ms = 1e3 * seconds
    digits = 0 if ms >= 99.95 else 1 if ms >= 9.995 else 2
    return f"{ms:.{digits}f} ms"


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit, value in _UNITS:
        if count >= value:
            return f"{count / value:.3g} {unit}"
    return f"{count:.0f} B"
