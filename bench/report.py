"""Tables, a page and what changed, from the results of the benchmark suite.

    python -m bench.report RESULTS.json                      # the small table, printed
    python -m bench.report RESULTS.json --html speed.html --markdown speed.md --readme README.md
    python -m bench.report RESULTS.json --base OLDER.json --fail-above 10
    python -m bench.report RESULTS.json --compact bench/results/MACHINE-DATE.json

RESULTS.json is what ``python -m pytest bench --benchmark-json RESULTS.json`` wrote, or the plain
results of ``slimkern bench`` or ``--compact``. ``--base`` compares ratios to a peer of the same
run (torch eager in the same precision; for training steps the one that multiplies by masks), never
absolute times, and with ``--fail-above PERCENT`` exits with 1 where something of slimkern's own got
slower by more.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from slimkern.report.speed_check import check_speed
from slimkern.report.speed_compare import compare, comparison_text
from slimkern.report.speed_schema import SpeedResults
from slimkern.report.speed_tables import full_tables, readme_table

START, END = "<!-- speed table -->", "<!-- /speed table -->"
_ROUNDED = ("error", "bound", "first_call", "floor")


def load(path: Path) -> SpeedResults:
    """Results from a file of pytest-benchmark or of plain results.

    Raises:
        ValueError: the file is no JSON, neither of the two, or malformed; the message names the
            file and what is wrong.
        OSError: it can't be read.
    """
    text = path.read_text(encoding="utf-8")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if isinstance(data, Mapping) and "benchmarks" in data:
        results = _from_benchmarks(data, path)
    elif isinstance(data, Mapping) and "rows" in data:
        results = dict(data)
    else:
        raise ValueError(
            f"{path} has neither benchmarks nor rows; accepted: what `pytest bench "
            "--benchmark-json FILE`, `slimkern bench` or `--compact` wrote"
        )
    try:
        check_speed(results)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return cast(SpeedResults, results)


def _from_benchmarks(data: Mapping[str, Any], path: Path) -> dict[str, Any]:
    header = data.get("machine_info", {}).get("slimkern")
    if header is None:
        raise ValueError(
            f"{path} has no machine_info.slimkern; accepted: what `pytest bench "
            "--benchmark-json FILE` of this repository wrote"
        )
    rows = list(header.get("rows") or ())
    for benchmark in data["benchmarks"]:
        name, extra = benchmark.get("name", "?"), benchmark.get("extra_info", {})
        if "rows" not in extra:
            raise ValueError(f"{path}: benchmark {name!r} has no extra_info.rows")
        rows += [
            _with_seconds(row, benchmark, f"{path}: benchmark {name!r}") for row in extra["rows"]
        ]
    return {**header, "rows": rows}


def _with_seconds(row: dict[str, Any], benchmark: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The subject's seconds lie in the benchmark's own rounds, each of ``repeats`` calls."""
    if not row.get("subject") or "seconds" in row:
        return row
    data, repeats = benchmark.get("stats", {}).get("data"), benchmark["extra_info"].get("repeats")
    if not data or not repeats:
        raise ValueError(f"{name}: its subject has no seconds, stats.data or extra_info.repeats")
    return {**row, "seconds": [value / repeats for value in data]}


def compact(results: SpeedResults) -> str:
    """The results as JSON, small enough to be committed: a line per row, four digits."""
    header = {key: value for key, value in results.items() if key != "rows"}
    lines = [f"{json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in header.items()]
    rows = ",\n".join(json.dumps(_rounded(row), allow_nan=False) for row in results["rows"])
    return "{\n" + ",\n".join(lines) + ',\n"rows": [\n' + rows + "\n]\n}\n"


def _rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """Four digits; what is not finite (the error of a wrong output) is left out."""
    found = dict(row)
    for key in _ROUNDED:
        if key in found and not math.isfinite(found[key]):
            del found[key]
        elif key in found:
            found[key] = _four(found[key])
    if "bounds" in found:
        found["bounds"] = {gpu: _four(value) for gpu, value in found["bounds"].items()}
    if "seconds" in found:
        found["seconds"] = [_four(value) for value in found["seconds"]]
    return found


def _four(value: float) -> float:
    return float(f"{value:.4g}")


def into_readme(
    readme: str, table: str, name: str = "README.md", markers: tuple[str, str] = (START, END)
) -> str:
    """The README with the table between its two markers.

    Raises:
        ValueError: the markers are not there once each, in their order.
    """
    start, end = markers
    parts = readme.split(start)
    rest = parts[-1].split(end)
    if len(parts) != 2 or len(rest) != 2:
        raise ValueError(f"{name} does not hold {start!r} and then {end!r}, once each")
    return f"{parts[0]}{start}\n\n{table.strip()}\n\n{end}{rest[1]}"


def write(path: Path, text: str) -> None:
    """Write a file at once or not at all, and say so; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)
    print(f"wrote {path}")


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("results", type=Path, help="of pytest-benchmark, or plain results")
    parser.add_argument("--html", type=Path, help="write the page to this file or folder")
    parser.add_argument("--markdown", type=Path, help="write the full tables")
    parser.add_argument("--readme", type=Path, help="put the small table between its markers")
    parser.add_argument("--compact", type=Path, help="write the results small, to be committed")
    parser.add_argument("--base", type=Path, help="results to compare with")
    parser.add_argument(
        "--fail-above",
        type=float,
        metavar="PERCENT",
        help="with --base: exit with 1 where slimkern's own got slower by more than this",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = _arguments()
    asked = parser.parse_args(arguments)
    if asked.fail_above is not None and asked.base is None:
        parser.error("--fail-above needs --base FILE")
    try:
        return _run(asked)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _run(asked: argparse.Namespace) -> int:
    results = load(asked.results)
    if asked.html:
        from slimkern.report.speed_page import write_speed_report  # draws: matplotlib, jinja2

        print(f"wrote {write_speed_report(results, asked.html)}")
    if asked.markdown:
        write(asked.markdown, full_tables(results))
    if asked.compact:
        write(asked.compact, compact(results))
    if asked.readme:
        text = asked.readme.read_text(encoding="utf-8")
        write(asked.readme, into_readme(text, readme_table(results), asked.readme.name))
    if asked.base:
        return _compare(results, load(asked.base), asked.fail_above)
    if not (asked.html or asked.markdown or asked.compact or asked.readme):
        print(readme_table(results), end="")
    return 0


def _compare(now: SpeedResults, before: SpeedResults, fail_above: float | None) -> int:
    found = compare(before, now)
    print(comparison_text(found, before, now), end="")
    if fail_above is None:
        return 0
    slower = found.own_slower(fail_above / 100)
    for change in slower:
        print(f"too slow: {', '.join(change.key)}: {change.slower:.0%}", file=sys.stderr)
    return 1 if slower else 0


if __name__ == "__main__":
    raise SystemExit(main())
