"""Where measured latency tables lie: JSON files, named by the question that they answer."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from slimkern import machine
from slimkern.costs import Costs
from slimkern.discovery.groups import Group

_FORMAT, _VERSION = "slimkern-latency", 1


def digest(data: Any) -> str:
    """The SHA-256 of JSON data, in hexadecimal: the same data gives the same name."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def default_folder() -> Path:
    """``latency`` in the user's cache folder: ``$XDG_CACHE_HOME/slimkern`` or the platform's."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if base and Path(base).is_absolute():  # the specification ignores relative paths
        return Path(base) / "slimkern" / "latency"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "slimkern" / "latency"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
        return Path(local) / "slimkern" / "Cache" / "latency"
    return Path.home() / ".cache" / "slimkern" / "latency"


def read(path: Path, question: dict[str, Any], groups: tuple[Group, ...]) -> Costs | None:
    """The table in a file, or ``None`` where there is none, or it is broken or of another kind."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if [data["format"], data["version"]] != [_FORMAT, _VERSION]:
            return None
        if data["question"] != question:
            return None
        tables = {n: {int(w): float(t) for w, t in rows} for n, rows in data["tables"].items()}
        fixed = float(data["fixed"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    values = [fixed, *(t for table in tables.values() for t in table.values())]
    whole = all(g.num_units == max(tables.get(g.name) or {0: 0.0}) for g in groups)
    if not whole or len(tables) != len(groups) or not all(map(math.isfinite, values)):
        return None
    return Costs("seconds", fixed, tables)


def write(path: Path, question: dict[str, Any], costs: Costs) -> None:
    """Write beside ``path``, then move into place: a reader sees a whole file or none."""
    data = {
        "format": _FORMAT,
        "version": _VERSION,
        "measured": machine.now(),
        "question": question,
        "fixed": costs.fixed,
        "tables": {name: sorted(table.items()) for name, table in costs.tables.items()},
    }
    handle, scratch = tempfile.mkstemp(prefix=".latency-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, sort_keys=True)
        os.replace(scratch, path)
    finally:
        Path(scratch).unlink(missing_ok=True)
