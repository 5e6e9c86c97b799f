"""From ``results`` to one HTML page that needs nothing else: no script, no network, no fonts."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from slimkern.report import comparisons, figures
from slimkern.report.check import check
from slimkern.report.figures import both
from slimkern.report.schema import LatencyRow, Results, Size
from slimkern.report.signs import MINUS, TIMES

if TYPE_CHECKING:
    from slimkern.training.evaluation import Score

RANGE = "\u2013"  # the dash between two figures

PAGE_FILE, RESULTS_FILE = "report.html", "results.json"


def write_report(results: Results, folder: str | Path) -> Path:
    """Write ``report.html`` and, beside it, ``results.json``.

    Args:
        results: what the run has to tell; :mod:`slimkern.report.schema` says in which shape.
        folder: where to write; created if it is not there.

    Returns:
        the path of the page.

    Raises:
        ValueError: a section is missing, unknown or malformed; the message names it.
        OSError: the folder can't be written.
    """
    page = render(results)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
    _write(folder / RESULTS_FILE, data + "\n")
    return _write(folder / PAGE_FILE, page)


def render(results: Results) -> str:
    """The page as text. All text of the results is escaped.

    Raises:
        ValueError: as :func:`write_report`.
    """
    check(results)
    environment = Environment(
        loader=PackageLoader("slimkern.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(count=_count, score=_score, signed=_signed, ms=_ms, mb=_mb)
    environment.filters.update(duration=_duration, setting=_setting, faster=comparisons.faster)
    template = environment.get_template("report.html.j2")
    return template.render(
        r=results,
        cards=_cards(results),
        figures={name: Markup(svg) for name, svg in _figures(results).items()},
        size_rows=_size_rows(results.get("size") or {}),
        family_rows=comparisons.family_rows(results["family"]) if results.get("family") else [],
        method_rows=comparisons.method_rows(results.get("methods") or ()),
        machine=_machine(results),
    )


def _figures(results: Results) -> dict[str, str]:
    """The figures of the sections that are there."""
    drawn = {}
    if results.get("scores"):
        drawn["accuracy"] = figures.accuracy(results["scores"])
    if results.get("layers"):
        drawn["widths"] = figures.widths(results["layers"])
    if any("error" in width for width in results.get("layers") or ()):
        drawn["errors"] = figures.errors(results["layers"])
    if results.get("methods"):
        names = [method["name"] for method in results["methods"]]
        rows = comparisons.method_rows(results["methods"])
        if rows:
            drawn["methods"] = comparisons.methods(names, rows)
    if results.get("family"):
        found = comparisons.curve_of(results)
        if found is not None:
            drawn["curve"] = found
    if results.get("history"):
        drawn["history"] = figures.history(results["history"], results.get("history_score", ""))
    if results.get("size"):
        drawn["size"] = figures.size(results["size"])
    if _latency_rows(results):
        drawn["latency"] = figures.latency(_latency_rows(results))
    return drawn


def _latency_rows(results: Results) -> Sequence[LatencyRow]:
    return (results.get("latency") or {}).get("rows") or ()


def _cards(results: Results) -> list[dict[str, str]]:
    """The few figures that are read first."""
    cards = []
    size: Size = results.get("size") or {}
    for key, label in (
        ("parameters_no_embeddings", "parameters in the layers"),
        ("parameters", "parameters in all"),
    ):
        if f"dense_{key}" in size and f"slim_{key}" in size:
            dense, slim = both(size, key)
            share = f"{MINUS}{1 - slim / dense:.0%}" if dense else ""
            note = f"{dense / 1e6:.1f} M → {slim / 1e6:.1f} M"
            cards.append({"value": share, "label": label, "note": note})
    if results.get("scores"):
        score = _headline(results["scores"])
        label = f"{score['split']} {score['metric']}"
        note = f"dense {_score(score['dense'])}, {_signed(score['slim'] - score['dense'])}"
        cards.append({"value": _score(score["slim"]), "label": label, "note": note})
    rows = _latency_rows(results)
    if rows:
        ratios = sorted(r["dense_median"] / r["slim_median"] for r in rows)
        low, high = f"{ratios[0]:.2f}{TIMES}", f"{ratios[-1]:.2f}{TIMES}"
        value = low if low == high else f"{low[:-1]}{RANGE}{high}"
        threads = results["latency"].get("threads")
        note = f"median, {_plural(threads, 'thread')}" if threads else "median"
        cards.append({"value": value, "label": "the dense speed", "note": note})
    return cards


def _headline(scores: Sequence[Score]) -> Score:
    """The score on the last split, Spearman's if it is there: what an embedding is judged by."""
    last = [s for s in scores if s["split"] == scores[-1]["split"]]
    return next((s for s in last if s["metric"].lower() == "spearman"), last[0])


def _size_rows(size: Size) -> list[dict[str, Any]]:
    rows = []
    for label, key, text in (
        ("Parameters in the layers", "parameters_no_embeddings", _count),
        ("Parameters in all", "parameters", _count),
        ("Weights file", "bytes", _mb),
    ):
        if f"dense_{key}" in size and f"slim_{key}" in size:
            dense, slim = both(size, key)
            share = f"{MINUS}{1 - slim / dense:.1%}" if dense else ""
            rows.append({"label": label, "dense": text(dense), "slim": text(slim), "share": share})
    return rows


def _machine(results: Results) -> str:
    """The machine in one line."""
    here = results["machine"]
    parts = [str(here.get("cpu", ""))]
    if "cores" in here:
        parts.append(_plural(here["cores"], "core"))
    if "memory_gib" in here:
        parts.append(f"{here['memory_gib']:g} GiB")
    if "isa" in here:
        parts.append(f"kernels for {here['isa']}")
    parts += [str(here.get("gpu", "")), str(here.get("system", ""))]
    return ", ".join(p for p in parts if p)


def _plural(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _count(value: float) -> str:
    return f"{int(value):,}"


def _score(value: float) -> str:
    return f"{value:.4f}"


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", MINUS)


def _ms(seconds: float) -> str:
    milliseconds = seconds * 1e3
    return f"{milliseconds:,.1f}" if milliseconds >= 10 else f"{milliseconds:.2f}"


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest:02d} s"


def _setting(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _write(path: Path, text: str) -> Path:
    """Write a file whole: a page that is being looked at is never half there."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)
    return path
