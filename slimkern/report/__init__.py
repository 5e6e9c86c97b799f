"""HTML reports: one self-contained page of a run or of a benchmark, and the results as JSON.

What draws is imported when it is first asked for: the schemas, their checks and the tables in
markdown need neither matplotlib nor jinja2.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
_HOMES = {
    "render": "page",
    "write_report": "page",
    "Results": "schema",
    "layer_widths": "schema",
    "render_speed": "speed_page",
    "write_speed_report": "speed_page",
}


def __getattr__(name: str) -> Any:
    """The public names, from their modules."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
