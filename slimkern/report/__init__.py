"""The HTML report of a run: one self-contained page, and the results behind it as JSON."""

from __future__ import annotations

from slimkern.report.page import render, write_report
from slimkern.report.schema import Results, layer_widths

__all__ = ["Results", "layer_widths", "render", "write_report"]
