"""Numbers and names of speed results as text: the same words in tables and on the page."""

from __future__ import annotations

from slimkern.report.signs import TIMES
from slimkern.report.speed_schema import SpeedResults

RANGE, NONE = "\u2013", "\u2013"  # the dash between two figures, and where there is none

LEVEL_NAMES = {
    "model": "Whole models",
    "training": "Training steps",
    "layer": "One layer",
    "op": "Single operations",
}
"""In the order in which a reader wants them."""
PRECISION_NAMES = {
    "fp32": "float32",
    "fp32-high": "float32, matmul precision high",
    "fp32-medium": "float32, matmul precision medium",
    "bf16": "bfloat16",
}
BOUNDS_TITLE = "Bounds by data sheet: no results"
BOUNDS_NOTE = (
    "Milliseconds that the peaks of a GPU's data sheet alone would take: the products at the full "
    "rate of its matrix units, or every number moved once at that of its memory. Nothing here was "
    "measured, and no kernel reaches it."
)


def ms(seconds: float) -> str:
    """Milliseconds with three significant digits, no unit: ``307``, ``49.0``, ``0.0214``."""
    return three(seconds * 1e3)


def three(value: float) -> str:
    """Three significant digits (fewer below a thousandth); whole numbers from 100 on."""
    for limit, digits in ((100.0, 0), (10.0, 1), (1.0, 2), (0.1, 3), (0.01, 4)):
        if abs(value) >= limit:
            return f"{value:,.{digits}f}"
    return f"{value:.5f}"


def times(value: float) -> str:
    """``1.45×``; ``12.3×`` from ten on."""
    return f"{value:.2f}{TIMES}" if value < 10 else f"{value:,.1f}{TIMES}"


def percent(value: float) -> str:
    """A fraction as whole percent, one digit below ten: ``61 %``, ``3.2 %``."""
    return f"{value * 100:.0f} %" if value >= 0.0995 else f"{value * 100:.1f} %"


def error(value: float) -> str:
    """A relative error: ``3.1e-07``."""
    return f"{value:.1e}"


def megabytes(size: float) -> str:
    """``90.9 MB``, three significant digits."""
    return f"{three(size / 1e6)} MB"


def duration(seconds: float) -> str:
    """``0.123 s``, ``12.3 s``, ``3 min 05 s``, ``1 h 2 min``."""
    if seconds < 100:
        return f"{three(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest:02d} s"


def peak(value: float, unit: str) -> str:
    """A measured limit: ``221 GFLOP/s``, ``18.4 GB/s``, ``3.54 TFLOP/s``."""
    word = {"flop/s": "FLOP/s", "byte/s": "B/s"}[unit]
    return f"{three(value / 1e12)} T{word}" if value >= 1e12 else f"{three(value / 1e9)} G{word}"


def plural(number: int, word: str) -> str:
    """``1 thread``, ``2 threads``, ``1,024 rows``."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def first_line(results: SpeedResults) -> str:
    """What stands above every figure: machine, ISA, threads, versions, date."""
    here = results["machine"]
    parts = [str(here.get("gpu", "")), str(here.get("cpu", ""))]
    if "driver" in here:
        parts.insert(1, f"driver {here['driver']}")
    if "cores" in here:
        parts.append(plural(here["cores"], "core"))
    if "isa" in here:
        parts.append(f"kernels for {here['isa']}")
    parts.append(plural(results["threads"], "thread"))
    parts += [f"{name} {version}" for name, version in results["versions"].items()]
    parts.append(results["date"])
    return ", ".join(part for part in parts if part)
