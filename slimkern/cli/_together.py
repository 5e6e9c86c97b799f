"""One page about the runs that share a folder and a teacher."""

from __future__ import annotations

import json
from pathlib import Path

from slimkern.cli._run_folder import GRADUAL, ONE_SHOT
from slimkern.report import write_report
from slimkern.report.schema import Results, method_result

METHODS = (ONE_SHOT, GRADUAL)


def write_together(home: Path) -> Results:
    """Write ``results.json`` and ``report.html`` of the finished runs in a folder.

    The sections are those of the first method that has run; where both have, ``methods`` holds
    them side by side.
    """
    found: list[Results] = []
    for name in METHODS:
        path = home / name / "results.json"
        if path.is_file():
            found.append(json.loads(path.read_text(encoding="utf-8")))
    first: Results = dict(found[0])  # type: ignore[assignment]
    first.pop("methods", None)
    if len(found) > 1:
        first["methods"] = [method_result(results) for results in found]
    write_report(first, home)
    return first
