"""What changed between two runs: ratios to a peer of the same run, never absolute times.

A ratio is a provider's time over the peer's (torch eager in the same precision; for training steps
the one that multiplies by masks), round by round, with its interval. A change is reported where the
intervals of both runs do not overlap, so that noise within a run is not taken for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slimkern.report import speed_text as text
from slimkern.report.signs import TIMES
from slimkern.report.speed_read import BASES, is_own, read
from slimkern.report.speed_schema import Precision, SpeedResults, SpeedRow
from slimkern.timing import Ratio, ratio

Key = tuple[str, str, Precision]  # case, provider, precision


@dataclass(frozen=True)
class Change:
    """A provider that got slower or faster against its peer.

    Attributes:
        key: case, provider, precision.
        peer: whom it is compared with.
        before, now: its time over the peer's.
    """

    key: Key
    peer: str
    before: Ratio
    now: Ratio

    @property
    def slower(self) -> float:
        """By how much, as a fraction of before: 0.2 is 20 % slower, negative is faster."""
        return self.now.median / self.before.median - 1.0


@dataclass(frozen=True)
class Comparison:
    """What changed.

    Attributes:
        changes: the slowest first.
        compared: how many rows could be compared.
        new, missing: rows with times in one run only.
        failed: rows whose output is wrong now and was not before.
        alone: rows in both runs without a common peer.
    """

    changes: tuple[Change, ...]
    compared: int
    new: tuple[Key, ...]
    missing: tuple[Key, ...]
    failed: tuple[Key, ...]
    alone: tuple[Key, ...]

    def own_slower(self, above: float) -> list[Change]:
        """slimkern's own that got slower by more than the fraction ``above``."""
        return [c for c in self.changes if is_own(c.key[1]) and c.slower > above]


def compare(before: SpeedResults, now: SpeedResults) -> Comparison:
    """What changed from one run to another.

    Raises:
        ValueError: one of them is malformed; the message names the row and key.
    """
    read(before), read(now)  # refuses what is malformed
    old, new = _timed(before), _timed(now)
    changes, alone, compared = [], [], 0
    for key in [k for k in new if k in old]:
        peer = _peer(key, old, new)
        if peer is None:
            alone.append(key)
        elif peer != key[1]:
            compared += 1
            found = Change(key, peer, _against(key, peer, old), _against(key, peer, new))
            if found.before.high < found.now.low or found.now.high < found.before.low:
                changes.append(found)
    wrong = [_key(row) for row in before["rows"] if "failed" in row]
    return Comparison(
        changes=tuple(sorted(changes, key=lambda c: -c.slower)),
        compared=compared,
        new=tuple(k for k in new if k not in old),
        missing=tuple(k for k in old if k not in new),
        failed=tuple(
            k for row in now["rows"] if "failed" in row for k in [_key(row)] if k not in wrong
        ),
        alone=tuple(alone),
    )


def comparison_text(found: Comparison, before: SpeedResults, now: SpeedResults) -> str:
    """The comparison as markdown."""
    parts = [
        f"Before: {text.first_line(before)}.",
        f"Now: {text.first_line(now)}.",
        f"{text.plural(found.compared, 'row')} compared by the time over a peer's of the same run; "
        f"{len(found.changes)} changed (the intervals of the two ratios do not overlap).",
    ]
    if _place(before) != _place(now):
        parts.insert(2, "**The machine, the kernels' ISA or the threads are not the same.**")
    if found.failed:
        parts.append("**Wrong now, and not before:**\n\n" + _list(found.failed))
    if found.changes:
        head = "| | case | provider | precision | before | now | peer |"
        lines = [head, "|---:|---|---|---|---:|---:|---|"]
        lines += [_line(change) for change in found.changes]
        parts.append("\n".join(lines))
    for title, keys in (
        ("New", found.new),
        ("Missing now", found.missing),
        ("Without a common peer, not compared", found.alone),
    ):
        if keys:
            parts.append(f"{title}:\n\n{_list(keys)}")
    return "\n\n".join(parts) + "\n"


def _timed(results: SpeedResults) -> dict[Key, SpeedRow]:
    return {_key(row): row for row in results["rows"] if "seconds" in row}


def _key(row: SpeedRow) -> Key:
    return row["case"], row["provider"], row["precision"]


def _peer(key: Key, *runs: Mapping[Key, SpeedRow]) -> str | None:
    """The first base of the level that was timed in all runs, in the same case and precision."""
    case, _, precision = key
    bases = BASES[runs[0][key]["level"]]
    return next((b for b in bases if all((case, b, precision) in run for run in runs)), None)


def _against(key: Key, peer: str, run: Mapping[Key, SpeedRow]) -> Ratio:
    return ratio(run[key]["seconds"], run[key[0], peer, key[2]]["seconds"])


def _place(results: SpeedResults) -> tuple[object, ...]:
    here = results["machine"]
    return here.get("cpu"), here.get("isa"), here.get("gpu"), results["threads"]


def _line(change: Change) -> str:
    case, provider, precision = change.key
    size = f"{abs(change.slower):.0%}".replace("%", " %")
    word = f"{size} slower" if change.slower > 0 else f"{size} faster"
    shown = f"**{word}**" if is_own(provider) else word
    ratios = [
        f"{r.median:.3f}{TIMES} ({r.low:.3f} to {r.high:.3f})" for r in (change.before, change.now)
    ]
    return f"| {shown} | {case} | {provider} | {precision} | {' | '.join(ratios)} | {change.peer} |"


def _list(keys: tuple[Key, ...]) -> str:
    return "\n".join(f"- {', '.join(key)}" for key in keys)
