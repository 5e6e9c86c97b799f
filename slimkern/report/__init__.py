"""HTML reports: one self-contained page of a run or of a benchmark, and the results as JSON."""

from __future__ import annotations

from slimkern.report.page import render, write_report
from slimkern.report.schema import Results, layer_widths
from slimkern.report.speed_page import render_speed, write_speed_report

__all__ = [
    "Results",
    "layer_widths",
    "render",
    "render_speed",
    "write_report",
    "write_speed_report",
]
