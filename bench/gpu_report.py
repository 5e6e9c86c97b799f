"""The small tables of a GPU's results, for a terminal and for the README.

    python -m bench.gpu_report RESULTS.json                       # printed
    python -m bench.gpu_report RESULTS.json --readme README.md    # between its two markers

RESULTS.json is what ``python -m bench.gpu`` wrote. Everything that was measured, and the page, are
drawn by ``python -m bench.report``.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from bench import report
from bench.gpu_works import LAUNCHED
from slimkern.report import speed_text as text
from slimkern.report.speed_read import Block, Entry, Reading, is_own, read
from slimkern.report.speed_schema import SpeedResults
from slimkern.timing import ratio

MARKERS = ("<!-- gpu table -->", "<!-- /gpu table -->")
PEERS = {
    "torch eager": "gather (or mask) + cuBLAS",
    "torch, sliced before": "cuBLAS on the slice",
    "torch.compile": "torch.compile",
    "torch eager, dense": "dense cuBLAS",
}


def small_tables(results: SpeedResults) -> str:
    """Models and training steps in milliseconds; operations as ratios to their peers.

    Raises:
        ValueError: the results are malformed.
    """
    reading = read(results)
    parts = [text.first_line(results) + "."]
    if results.get("smoke"):
        parts.append("A rehearsal: nothing was measured, the times mean nothing.")
    if reading.failed:
        names = ", ".join(f"{row['case']} ({row['provider']})" for row in reading.failed)
        parts.append(f"Wrong or failed, not timed: {names}.")
    for part in (_models(reading), _steps(reading), _operations(reading)):
        parts += [part] if part else []
    return "\n\n".join(parts) + "\n"


def _models(reading: Reading) -> str:
    """A row per model and provider, a column per shape: replayed / launched."""
    blocks = reading.of("model")
    shapes = list(dict.fromkeys(b.shape for b in blocks))
    works = list(dict.fromkeys((_plain(b), b.precision) for b in blocks))
    lines = []
    for work, precision in works:
        own = [b for b in blocks if _plain(b) == work and b.precision == precision]
        for provider in reading.providers_of(own):
            if provider.endswith(", dense"):
                continue  # a table row of its own
            cells = [_both([b for b in own if b.shape == s], provider) for s in shapes]
            lines.append([f"{work}, {precision}", provider, *cells])
    head = ["model, ms: CUDA graph / launched", "", *shapes]
    return _table(head, lines, left=2)


def _steps(reading: Reading) -> str:
    """A row per provider, a column per sparsity: replayed / launched."""
    blocks = reading.of("training")
    shapes = list(dict.fromkeys(b.shape for b in blocks))
    lines = []
    for precision in reading.precisions("training"):
        own = [b for b in blocks if b.precision == precision]
        for provider in reading.providers_of(own):
            cells = [_both([b for b in own if b.shape == s], provider) for s in shapes]
            lines.append([f"{provider}, {precision}", *cells])
    names = {_plain(b) for b in blocks}
    return _table(
        [f"{', '.join(sorted(names))}, ms: CUDA graph / launched", *shapes], lines, left=1
    )


def _plain(block: Block) -> str:
    return block.work.removesuffix(LAUNCHED)


def _both(blocks: Sequence[Block], provider: str) -> str:
    """``0.81 / 6.20``, a dash for what is not there."""
    found: dict[bool, Entry] = {
        b.work.endswith(LAUNCHED): b.entries[provider] for b in blocks if provider in b.entries
    }
    cells = [text.ms(found[k].median) if k in found else text.NONE for k in (False, True)]
    return text.NONE if set(cells) == {text.NONE} else " / ".join(cells)


def _operations(reading: Reading) -> str:
    """A row per kind of operation: how many times as fast as each peer, over all its shapes."""
    kinds: dict[str, list[Block]] = {}
    for level in ("op", "layer"):
        for block in reading.of(level):
            kinds.setdefault(f"{_kind(block.work)}, {block.precision}", []).append(block)
    lines = []
    for kind, blocks in kinds.items():
        cells = [_range(blocks, peer) for peer in PEERS]
        if set(cells) != {text.NONE}:
            lines.append([kind, str(len(blocks)), *cells, _reached(blocks)])
    head = ["slimkern, times as fast as", "shapes", *PEERS.values(), "of the measured limit"]
    return _table(head, lines, left=1)


def _kind(work: str) -> str:
    """The work without its sizes: ``indexed linear, rows fwd``."""
    work = re.sub(r" \d+(->\d+)?\b", "", work, count=1)
    return re.sub(r", \d+ (rows|cols|kept|heads)|, FFN \d+", r", \1", work).replace(", ,", ",")


def _own(block: Block) -> Entry | None:
    return next((e for name, e in block.entries.items() if is_own(name)), None)


def _range(blocks: Sequence[Block], peer: str) -> str:
    """``0.95–1.80×``: the smallest and the largest of the shapes' median ratios."""
    ratios = []
    for block in blocks:
        own, other = _own(block), block.entries.get(peer)
        if own is not None and other is not None:
            ratios.append(ratio(other.row["seconds"], own.row["seconds"]).median)
    if not ratios:
        return text.NONE
    low, high = text.times(min(ratios)), text.times(max(ratios))
    return low if low == high else f"{low[:-1]}{text.RANGE}{high}"


def _reached(blocks: Sequence[Block]) -> str:
    found = [own.reached for own in map(_own, blocks) if own is not None and own.reached]
    if not found:
        return text.NONE
    low, high = text.percent(min(found)), text.percent(max(found))
    return low if low == high else f"{low.removesuffix(' %')}{text.RANGE}{high}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    if not lines:
        return ""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *lines))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("results", type=Path)
    parser.add_argument("--readme", type=Path, help="put the tables between its markers")
    asked = parser.parse_args(arguments)
    try:
        results = report.load(asked.results)
        tables = small_tables(results)
        if asked.readme is None:
            print(tables, end="")
        elif results.get("smoke"):
            parser.error(f"{asked.results} is a rehearsal; accepted: what was measured on a GPU")
        else:
            readme = asked.readme.read_text(encoding="utf-8")
            made = report.into_readme(readme, tables, asked.readme.name, MARKERS)
            report.write(asked.readme, made)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
