"""Speed results as markdown: the README's small table, and the full tables.

A time is the minimum over the rounds. A ratio is the base's time over the provider's, median of the
rounds' ratios, with the farther end of its interval: ``1.45 ± 0.05×`` is faster than the base.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from slimkern.report import speed_text as text
from slimkern.report.signs import TIMES
from slimkern.report.speed_read import Block, Entry, Reading, Skipped, is_own, read
from slimkern.report.speed_schema import Precision, SpeedResults

LEVEL_ORDER = tuple(text.LEVEL_NAMES)
README_FAMILIES = 2  # model families that fit a README
_BETWEEN: tuple[Precision, ...] = ("fp32-high", "fp32-medium")
_OTHER_CUTS = ("hand-sliced", "torch-pruning")
_SPARSITY = re.compile(r"(\d+(?:\.\d+)?)\s*%")


def readme_table(results: SpeedResults) -> str:
    """The small table: dense and slim times of two models, and the training step.

    A row per provider and precision, a column per shape, ``307 → 105`` for dense and slim. Models
    that come without a slim partner (a user's own bench) show their time alone. Of the precisions
    between float32 and bfloat16 only slimkern's own rows are here, models that were cut by other
    means (the check that slim is slim) are not, and of what was not run only providers that did
    nothing at all; the full tables have everything.

    Raises:
        ValueError: the results are malformed; the message names the row and key.
    """
    reading = read(results)
    parts = [text.first_line(results) + ".", *_failures(reading)]
    parts += [_family(reading, name, works) for name, works in _families(reading)]
    parts += [_training(reading, work) for work in _first_works(reading, "training", 1)]
    return "\n\n".join([*parts, *_left_out(reading, absent_only=True)]) + "\n"


def full_tables(results: SpeedResults) -> str:
    """Every level: times with ratios, then errors with the fraction of the limit.

    Raises:
        ValueError: as :func:`readme_table`.
    """
    reading = read(results)
    parts = [f"# {results['title']}", text.first_line(results) + ".", *_failures(reading)]
    parts += [f"- {note}" for note in results.get("notes") or ()]
    for level in LEVEL_ORDER:
        if level not in reading.levels:
            continue
        parts.append(f"## {text.LEVEL_NAMES[level]}")
        for precision in reading.precisions(level):
            blocks = reading.of(level, precision)
            names = reading.providers_of(blocks)
            parts.append(f"### {text.PRECISION_NAMES[precision]}")
            parts.append(_times_caption(blocks))
            parts.append(_table(blocks, names, _time_cell))
            parts.append("Error against fp64 (relative, rms) and fraction of the limit reached:")
            parts.append(_table(blocks, names, _error_cell, last="limit"))
    parts += [*_limits(results), *_bounds(reading), *_left_out(reading)]
    return "\n\n".join(parts) + "\n"


def _times_caption(blocks: Sequence[Block]) -> str:
    bases = list(dict.fromkeys(b.base for b in blocks if b.base))
    if not bases:
        return "Milliseconds, minimum of the rounds; the fastest in bold."
    levels = [e.ratio.level for b in blocks for e in b.entries.values() if e.ratio is not None]
    level = f", the interval's level at least {min(levels):.3g}" if levels else ""
    return (
        f"Milliseconds, minimum of the rounds; the fastest in bold. In brackets: how many times as "
        f"fast as {' or '.join(bases)} in the same rounds (median{level})."
    )


def _table(blocks: Sequence[Block], names: Sequence[str], cell: object, last: str = "") -> str:
    """A row per work and shape, a column per provider."""
    assert callable(cell)
    head = ["work", "shape", *names, *([last] if last else [])]
    lines = [_row(head), _row(["---", "---"] + ["---:"] * len(names) + ["---"] * bool(last))]
    work = ""
    for block in blocks:
        cells = [cell(block, name) for name in names]
        first = block.work if block.work != work else ""
        work = block.work
        lines.append(_row([first, block.shape, *cells, *([_limit_of(block)] if last else [])]))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _time_cell(block: Block, name: str) -> str:
    entry = block.entries.get(name)
    if entry is None:
        return _absent(block, name)
    time = text.ms(entry.minimum)
    shown = f"**{time}**" if entry is block.fastest else time
    return f"{shown} ({_ratio(entry)})" if entry.ratio is not None else shown


def _ratio(entry: Entry) -> str:
    assert entry.ratio is not None
    found = entry.ratio
    away = max(found.high - found.median, found.median - found.low)
    digits = 3 if found.median < 1 else 2 if found.median < 10 else 1
    return f"{found.median:.{digits}f} ± {away:.{digits}f}{TIMES}"


def _error_cell(block: Block, name: str) -> str:
    entry = block.entries.get(name)
    if entry is None:
        return _absent(block, name)
    share = f", {text.percent(entry.reached)}" if entry.reached is not None else ""
    return text.error(entry.row["error"]) + share


def _absent(block: Block, name: str) -> str:
    kind, _ = block.absent.get(name, ("", ""))
    return "**wrong**" if kind == "failed" else text.NONE


def _limit_of(block: Block) -> str:
    found = dict.fromkeys(
        f"{e.row['limit']}, {text.ms(e.row['floor'])} ms"
        for e in block.entries.values()
        if e.row.get("limit") and e.row.get("floor")
    )
    return "; ".join(found)


def _limits(results: SpeedResults) -> list[str]:
    limits = results.get("limits") or ()
    if not limits:
        return []
    lines = [_row(["limit, measured", "peak"]), _row(["---", "---:"])]
    lines += [_row([x["name"], text.peak(x["value"], x["unit"])]) for x in limits]
    return ["## The machine's limits", "\n".join(lines)]


def _bounds(reading: Reading) -> list[str]:
    """Of several GPUs, by their data sheets."""
    if not reading.bounds:
        return []
    gpus = list(dict.fromkeys(gpu for bound in reading.bounds for gpu in bound.seconds))
    lines = [_row(["work", "shape", "", *gpus]), _row(["---"] * 3 + ["---:"] * len(gpus))]
    for bound in reading.bounds:
        cells = [text.ms(bound.seconds[g]) if g in bound.seconds else text.NONE for g in gpus]
        lines.append(_row([bound.work, bound.shape, bound.precision, *cells]))
    return ["## " + text.BOUNDS_TITLE, text.BOUNDS_NOTE, "\n".join(lines)]


def _failures(reading: Reading) -> list[str]:
    if not reading.failed:
        return []
    lines = [f"> **{text.plural(len(reading.failed), 'result')} failed and {_were(reading)}:**"]
    lines += [
        f"> - {row['case']}, {row['provider']}, {row['precision']}: {row['failed']}"
        for row in reading.failed
    ]
    return ["\n".join(lines)]


def _were(reading: Reading) -> str:
    return "was not timed" if len(reading.failed) == 1 else "were not timed"


def _left_out(reading: Reading, absent_only: bool = False) -> list[str]:
    """What was not run and why; with ``absent_only`` of providers that were never timed."""
    timed = {name for block in reading.blocks for name in block.entries} if absent_only else set()
    lines = [
        f"- {skipped_line(skipped)}"
        for skipped in reading.skipped
        if any(provider not in timed for provider, _, _ in skipped.who)
    ]
    if not lines:
        return []
    return ["Not run:\n\n" + "\n".join(lines)]


def skipped_line(skipped: Skipped) -> str:
    """``openvino (fp32-high, fp32-medium; 34 cases): the reason``."""
    who = ", ".join(
        f"{provider} ({', '.join(precisions)}; {text.plural(cases, 'case')})"
        for provider, precisions, cases in skipped.who
    )
    return f"{who}: {skipped.reason}"


def _first_works(reading: Reading, level: str, count: int) -> list[str]:
    return list(dict.fromkeys(b.work for b in reading.blocks if b.level == level))[:count]


def _families(reading: Reading) -> list[tuple[str, tuple[str, ...]]]:
    """(name, (dense work, slim work)) of models, or (name, (work,)) where none has a partner."""
    works = _first_works(reading, "model", len(reading.blocks))
    pairs: list[tuple[str, tuple[str, ...]]] = []
    for work in works:
        slim = re.sub(r"\bdense\b", "slim", work)
        if slim != work and slim in works:
            name = re.sub(r"[\s,]*\bdense\b[\s,]*", " ", work).strip()
            pairs.append((name, (work, slim)))
    return (pairs or [(work, (work,)) for work in works])[:README_FAMILIES]


def _family(reading: Reading, name: str, works: tuple[str, ...]) -> str:
    """One model: a row per provider and precision, a column per shape."""
    blocks = [b for b in reading.of("model") if b.work in works]
    shapes = list(dict.fromkeys(b.shape for b in blocks))
    by_place = {(b.work, b.shape, b.precision): b for b in blocks}
    best: dict[tuple[str, Precision], Entry | None] = {}
    for shape in shapes:
        for precision in reading.precisions("model"):
            block = by_place.get((works[-1], shape, precision))
            best[shape, precision] = block.fastest if block else None
    what = "dense → slim, " if len(works) == 2 else ""
    head = [f"{name}: {what}ms", "", *shapes]
    lines = [_row(head), _row(["---", "---"] + ["---:"] * len(shapes))]
    for precision in reading.precisions("model"):
        own = [b for b in blocks if b.precision == precision]
        for provider in reading.providers_of(own):
            if provider in _OTHER_CUTS or (precision in _BETWEEN and not is_own(provider)):
                continue
            cells = []
            for shape in shapes:
                places = [by_place.get((work, shape, precision)) for work in works]
                cells.append(_pair(places, provider, best[shape, precision]))
            lines.append(_row([precision, provider, *cells]))
    return "\n".join(lines)


def _pair(blocks: Sequence[Block | None], provider: str, best: Entry | None) -> str:
    """``307 → **105**``, a dash for what was not run; the fastest slim (last) one in bold."""
    cells = []
    for block in blocks:
        entry = block.entries.get(provider) if block else None
        if block is None or entry is None:
            cells.append(_absent(block, provider) if block else text.NONE)
        else:
            time = text.ms(entry.minimum)
            cells.append(f"**{time}**" if entry is best else time)
    return text.NONE if set(cells) == {text.NONE} else " → ".join(cells)


def _training(reading: Reading, work: str) -> str:
    """A training step: a row per provider and precision, a column per sparsity."""
    blocks = [b for b in reading.of("training") if b.work == work]
    shapes = list(dict.fromkeys(b.shape for b in blocks))
    found = [_SPARSITY.search(shape) for shape in shapes]
    heads = [f"{m.group(1)} % removed" if m else s for m, s in zip(found, shapes)]
    rest = {_SPARSITY.sub("", shape).strip(" ,") for shape in shapes}
    title = f"{work}, {rest.pop()}: ms" if len(rest) == 1 else f"{work}: ms"
    lines = [_row([title, "", *heads]), _row(["---", "---"] + ["---:"] * len(shapes))]
    for precision in reading.precisions("training"):
        own = {b.shape: b for b in blocks if b.precision == precision}
        for provider in reading.providers_of(list(own.values())):
            if precision in _BETWEEN and not is_own(provider):
                continue
            cells = [_pair([own.get(s)], provider, _fastest(own.get(s))) for s in shapes]
            lines.append(_row([precision, provider, *cells]))
    return "\n".join(lines)


def _fastest(block: Block | None) -> Entry | None:
    return block.fastest if block else None
