"""What speed results must hold to be shown honestly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from slimkern.report.speed_schema import (
    LEVELS,
    PRECISIONS,
    Limit,
    ModelSize,
    SpeedResults,
    SpeedRow,
)

REQUIRED = ("title", "command", "date", "machine", "versions", "threads", "rows")
ALWAYS = ("level", "case", "work", "shape", "provider", "precision")
TIMED = ("seconds", "error", "bound")
_TEXTS = ("case", "work", "shape", "provider", "limit", "skipped", "failed")
_COUNTS = ("flops", "bytes", "peak_bytes", "first_call", "floor", "error", "bound")


def check_speed(results: Mapping[str, Any]) -> None:
    """Refuse results that tables and the page could not show honestly.

    Raises:
        ValueError: a required key is missing, a key is unknown, a value can't be what it should, a
            provider is there twice for a case and precision, or the rounds of a case's rows don't
            go together; the message names the row, the key and what is accepted.
    """
    lacking = [key for key in REQUIRED if not results.get(key)]
    if lacking:
        raise ValueError(f"results lacks {', '.join(lacking)}; required: {', '.join(REQUIRED)}")
    _known(results, SpeedResults.__annotations__, "results")
    if not isinstance(results["rows"], Sequence):
        raise ValueError(f"results['rows'] is a {type(results['rows']).__name__}; accepted: a list")
    for index, limit in enumerate(results.get("limits") or ()):
        _check_limit(limit, f"results['limits'][{index}]")
    for provider, size in (results.get("models") or {}).items():
        _check_size(size, f"results['models'][{provider!r}]")
    for index, row in enumerate(results["rows"]):
        _check_row(row, _name(index, row))
    _check_together(results["rows"])


def _name(index: int, row: Any) -> str:
    """``results['rows'][3] (model/a/8x128, torch eager, fp32)``."""
    if not isinstance(row, Mapping):
        return f"results['rows'][{index}]"
    who = ", ".join(str(row.get(key, "?")) for key in ("case", "provider", "precision"))
    return f"results['rows'][{index}] ({who})"


def _known(section: Mapping[str, Any], accepted: Mapping[str, Any], name: str) -> None:
    unknown = sorted(set(section) - set(accepted))
    if unknown:
        raise ValueError(
            f"{name} has unknown {', '.join(unknown)}; accepted: {', '.join(accepted)}"
        )


def _check_row(row: Any, name: str) -> None:
    if not isinstance(row, Mapping):
        raise ValueError(f"{name} is a {type(row).__name__}; accepted: a dictionary")
    lacking = [key for key in ALWAYS if key not in row]
    if lacking:
        raise ValueError(f"{name} lacks {', '.join(lacking)}; required: {', '.join(ALWAYS)}")
    _known(row, SpeedRow.__annotations__, name)
    for key, accepted in (("level", LEVELS), ("precision", PRECISIONS)):
        if row[key] not in accepted:
            raise ValueError(f"{name}: {key} is {row[key]!r}; accepted: {', '.join(accepted)}")
    for key in _TEXTS:
        if key in row and not (isinstance(row[key], str) and row[key]):
            raise ValueError(f"{name}: {key} is {row[key]!r}; accepted: a text that is not empty")
    for key in _COUNTS:
        if key in row and key not in _loose(row) and not _is_number(row[key]):
            raise ValueError(f"{name}: {key} is {row[key]!r}; accepted: a number, at least 0")
    for gpu, value in (row.get("bounds") or {}).items():
        if not _is_number(value):
            raise ValueError(f"{name}: bounds[{gpu!r}] is {value!r}; accepted: a number of seconds")
    if "skipped" in row and "failed" in row:
        raise ValueError(f"{name} is both skipped and failed; accepted: one of them")
    if "skipped" in row or "failed" in row:
        if "seconds" in row:
            raise ValueError(f"{name} is skipped or failed and has seconds; accepted: no times")
    else:
        _check_timed(row, name)


def _loose(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys that need not be finite: the error of an output that is wrong may be anything."""
    return ("error", "bound") if "failed" in row else ()


def _check_timed(row: Mapping[str, Any], name: str) -> None:
    lacking = [key for key in TIMED if key not in row]
    if lacking:
        raise ValueError(
            f"{name} lacks {', '.join(lacking)}; accepted: {', '.join(TIMED)}, or the reason as "
            "skipped or failed"
        )
    seconds = row["seconds"]
    if not isinstance(seconds, Sequence) or isinstance(seconds, str) or not seconds:
        raise ValueError(f"{name}: seconds is {seconds!r}; accepted: a list, one number per round")
    wrong = [value for value in seconds if not (_is_number(value) and value > 0)]
    if wrong:
        raise ValueError(f"{name}: seconds holds {wrong[0]!r}; accepted: numbers above 0")
    if row["error"] > row["bound"]:
        raise ValueError(
            f"{name}: error is {row['error']:g}, above its bound {row['bound']:g}, yet it was "
            "timed; accepted: an error within the bound, or the row as failed"
        )


def _check_limit(limit: Any, name: str) -> None:
    keys = tuple(Limit.__annotations__)
    if not isinstance(limit, Mapping) or set(limit) != set(keys):
        raise ValueError(f"{name} is {limit!r}; accepted: a dictionary of {', '.join(keys)}")
    if limit["unit"] not in ("flop/s", "byte/s"):
        raise ValueError(f"{name}: unit is {limit['unit']!r}; accepted: flop/s, byte/s")
    for key in ("value", "size"):
        if not _is_number(limit[key]):
            raise ValueError(f"{name}: {key} is {limit[key]!r}; accepted: a number, at least 0")


def _check_size(size: Any, name: str) -> None:
    keys = tuple(ModelSize.__annotations__)
    if not isinstance(size, Mapping) or set(size) != set(keys):
        raise ValueError(f"{name} is {size!r}; accepted: a dictionary of {', '.join(keys)}")
    for key in keys:
        if not _is_number(size[key]):
            raise ValueError(f"{name}: {key} is {size[key]!r}; accepted: a number, at least 0")


def _check_together(rows: Sequence[Mapping[str, Any]]) -> None:
    """What rows say of each other: one of a kind, one work per case, rounds that go together."""
    seen: dict[tuple[str, ...], int] = {}
    works: dict[str, tuple[str, ...]] = {}
    rounds: dict[tuple[str, str], int] = {}
    for index, row in enumerate(rows):
        name = _name(index, row)
        key = (row["case"], row["provider"], row["precision"])
        if key in seen:
            raise ValueError(f"{name} is there already, as results['rows'][{seen[key]}]")
        seen[key] = index
        work = (row["level"], row["work"], row["shape"])
        if works.setdefault(row["case"], work) != work:
            raise ValueError(
                f"{name}: level, work and shape are {work}, and {works[row['case']]} in another "
                "row of its case; accepted: the same"
            )
        if "seconds" in row:
            own, group = len(row["seconds"]), (row["case"], row["precision"])
            if rounds.setdefault(group, own) != own:
                raise ValueError(
                    f"{name}: seconds has {own} rounds, another row of its case and precision "
                    f"{rounds[group]}; accepted: as many"
                )


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0
