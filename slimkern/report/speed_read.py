"""From speed results to what tables, page and comparison show: blocks, ratios, who is fastest."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from slimkern.report.speed_check import check_speed
from slimkern.report.speed_schema import (
    LEVELS,
    PRECISIONS,
    Level,
    Precision,
    SpeedResults,
    SpeedRow,
)
from slimkern.timing import Ratio, ratio

BASES: Mapping[Level, tuple[str, ...]] = {
    "op": ("torch eager", "dense"),
    "layer": ("torch eager", "dense"),
    "model": ("torch eager", "dense"),
    "training": ("mask multiply",),
}
"""What a ratio is taken to, of the same case and precision: the first of these that was timed."""


def is_own(provider: str) -> bool:
    """Is this slimkern's doing: its kernels, or the slim and the fused model of a user's bench?"""
    return provider.split()[0] in ("slimkern", "slim", "fused")


@dataclass(frozen=True)
class Entry:
    """A row with times, and what follows from it.

    Attributes:
        row: as the run left it.
        minimum, median: seconds over the rounds.
        spread: the middle half of the rounds (the quartiles' distance), over the median.
        ratio: the base's time over this one's, round by round: above 1 is faster than the base.
            ``None`` for the base itself and where it was not timed.
        reached: the fraction of the machine's limit; ``None`` where the limit is unknown.
    """

    row: SpeedRow
    minimum: float
    median: float
    spread: float
    ratio: Ratio | None
    reached: float | None

    @property
    def provider(self) -> str:
        """The provider's name."""
        return self.row["provider"]


@dataclass(frozen=True)
class Block:
    """One case in one precision: what is compared with each other.

    Attributes:
        level, case, work, shape, precision: of all its rows.
        base: the provider that ratios are taken to, or ``None``.
        entries: of the providers that were timed, by name, in the order of the page.
        absent: why a provider has no times: ``(skipped or failed, the reason)`` by name.
    """

    level: Level
    case: str
    work: str
    shape: str
    precision: Precision
    base: str | None
    entries: Mapping[str, Entry]
    absent: Mapping[str, tuple[str, str]]

    @cached_property
    def fastest(self) -> Entry | None:
        """The entry with the smallest minimum."""
        return min(self.entries.values(), key=lambda e: e.minimum, default=None)

    @cached_property
    def own_against_peers(self) -> Ratio | None:
        """The best peer's time over the best of slimkern's own; ``None`` without both."""
        own = [e for e in self.entries.values() if is_own(e.provider)]
        peers = [e for e in self.entries.values() if not is_own(e.provider)]
        if not own or not peers:
            return None
        best = [min(side, key=lambda e: e.minimum).row["seconds"] for side in (peers, own)]
        return ratio(*best)


@dataclass(frozen=True)
class Bound:
    """What data sheets' peaks alone would take for a piece of work; a bound and no result.

    Attributes:
        work, shape, precision: of a block.
        seconds: by GPU.
    """

    work: str
    shape: str
    precision: Precision
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Skipped:
    """A reason, and whom it kept out: (provider, precisions, number of cases)."""

    reason: str
    who: tuple[tuple[str, tuple[Precision, ...], int], ...]


@dataclass(frozen=True)
class Reading:
    """A run as it is shown.

    Attributes:
        results: as given.
        blocks: every case in every precision, in the order of the rows.
        providers: those with times or a failure: bases first, peers, slimkern's own.
        skipped: what could not run, every reason once.
        failed: the rows whose output was wrong.
    """

    results: SpeedResults
    blocks: tuple[Block, ...]
    providers: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    failed: tuple[SpeedRow, ...]

    def of(self, level: Level, precision: Precision | None = None) -> list[Block]:
        """The blocks of a level (and precision) in which something was timed or failed."""
        return [
            b
            for b in self.blocks
            if b.level == level and precision in (None, b.precision) and _is_shown(b)
        ]

    def precisions(self, level: Level) -> list[Precision]:
        """The precisions of a level, in their order."""
        found = {b.precision for b in self.of(level)}
        return [p for p in PRECISIONS if p in found]

    @cached_property
    def levels(self) -> list[Level]:
        """The levels that have something to show."""
        return [level for level in LEVELS if self.of(level)]

    @cached_property
    def bounds(self) -> list[Bound]:
        """Of every block that has them, once where blocks measure the same work in two ways."""
        found: dict[tuple[object, ...], Bound] = {}
        for b in self.blocks:
            entry = next((e for e in b.entries.values() if not e.provider.endswith("dense")), None)
            if entry is None or "bounds" not in entry.row:
                continue
            seconds = entry.row["bounds"]
            same = (b.level, b.work.removesuffix(", launched"), b.shape, b.precision)
            found.setdefault(same, Bound(b.work, b.shape, b.precision, seconds))
        return list(found.values())

    def providers_of(self, blocks: Sequence[Block]) -> list[str]:
        """The providers with times or a failure in some of the blocks, in the page's order."""
        found = {name for b in blocks for name in b.entries}
        found |= {name for b in blocks for name, (kind, _) in b.absent.items() if kind == "failed"}
        return [name for name in self.providers if name in found]


def read(results: SpeedResults) -> Reading:
    """What follows from a run's rows.

    Raises:
        ValueError: as :func:`slimkern.report.speed_check.check_speed`.
    """
    check_speed(results)
    rows = results["rows"]
    order = _provider_order([row for row in rows if "skipped" not in row])
    groups: dict[tuple[str, Precision], list[SpeedRow]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["precision"]), []).append(row)
    return Reading(
        results=results,
        blocks=tuple(_block(group, order) for group in groups.values()),
        providers=order,
        skipped=_skipped(rows),
        failed=tuple(row for row in rows if "failed" in row),
    )


def _is_shown(block: Block) -> bool:
    return bool(block.entries) or any(kind == "failed" for kind, _ in block.absent.values())


def _provider_order(rows: Sequence[SpeedRow]) -> tuple[str, ...]:
    names = list(dict.fromkeys(row["provider"] for row in rows))
    bases = list(dict.fromkeys(base for level in LEVELS for base in BASES[level]))

    def place(name: str) -> tuple[int, int]:
        if name in bases:
            return 0, bases.index(name)
        return (2 if is_own(name) else 1), names.index(name)

    return tuple(sorted(names, key=place))


def _block(rows: Sequence[SpeedRow], order: Sequence[str]) -> Block:
    first = rows[0]
    timed = {row["provider"]: row for row in rows if "seconds" in row}
    base = next((name for name in BASES[first["level"]] if name in timed), None)
    return Block(
        level=first["level"],
        case=first["case"],
        work=first["work"],
        shape=first["shape"],
        precision=first["precision"],
        base=base,
        entries={n: _entry(timed[n], timed.get(base or "")) for n in order if n in timed},
        absent={
            row["provider"]: (kind, str(row.get(kind)))
            for row in rows
            for kind in ("skipped", "failed")
            if kind in row
        },
    )


def _entry(row: SpeedRow, base: SpeedRow | None) -> Entry:
    seconds = row["seconds"]
    minimum, median = min(seconds), statistics.median(seconds)
    low, high = _quartiles(seconds)
    against = None if base is None or base is row else ratio(base["seconds"], seconds)
    floor = row.get("floor", 0.0)
    return Entry(
        row=row,
        minimum=minimum,
        median=median,
        spread=(high - low) / median,
        ratio=against,
        reached=floor / minimum if floor else None,
    )


def _quartiles(seconds: Sequence[float]) -> tuple[float, float]:
    if len(seconds) < 2:
        return seconds[0], seconds[0]
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low, high


def _skipped(rows: Sequence[SpeedRow]) -> tuple[Skipped, ...]:
    """Every reason once: for the providers that gave it, their precisions and how often."""
    reasons: dict[str, dict[str, list[SpeedRow]]] = {}
    for row in rows:
        if "skipped" in row:
            by_provider = reasons.setdefault(row["skipped"], {})
            by_provider.setdefault(row["provider"], []).append(row)
    return tuple(
        Skipped(
            reason,
            tuple(
                (
                    provider,
                    tuple(p for p in PRECISIONS if any(row["precision"] == p for row in own)),
                    len({row["case"] for row in own}),
                )
                for provider, own in by_provider.items()
            ),
        )
        for reason, by_provider in reasons.items()
    )
