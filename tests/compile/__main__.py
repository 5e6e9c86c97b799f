"""``python -m tests.compile``: compiles, checks, prints the tables. See the package's docstring."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

from tests.compile import cases, checks, matrix
from tests.compile.table import table
from tests.compile.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.compile")
    parser.add_argument("--full", action="store_true", help="every case in every configuration")
    parser.add_argument("--targets", nargs="+", choices=sorted(TARGETS), default=matrix.ORDER)
    parser.add_argument("--only", default="", help="ops and cases whose 'op: case' contains this")
    parser.add_argument("--table", type=Path, help="write the figures of every kernel as markdown")
    asked = parser.parse_args()
    started = time.monotonic()
    options = ["--full"] if asked.full else []
    rows, existing = matrix.run(asked.targets, *options, "--only", asked.only)
    promises = cases.promises()
    wrong = [text for row in rows for text in checks.complaints(row, promises)]
    if not asked.only and len(asked.targets) == len(TARGETS):
        missing = sorted(checks.never_launched(rows, existing))
        wrong += [f"no case launches {kernel}" for kernel in missing]
    text = "\n".join(f"## {target}\n\n{table(rows, target)}" for target in asked.targets)
    if asked.table:
        asked.table.write_text(text, encoding="utf-8")
    else:
        print(text)
    print("\n".join(wrong) or "nothing is wrong", file=sys.stderr)
    seconds = time.monotonic() - started
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = f"{seconds:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of processor time"
    print(f"{len(rows)} kernels in {spent}: {len(wrong)} complaints", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
