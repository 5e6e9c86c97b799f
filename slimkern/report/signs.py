"""Typographic signs, written so that nobody takes them for - and x."""

from __future__ import annotations

MINUS, TIMES = "\u2212", "\u00d7"
