"""A linear layer on a packed weight: its equation, its kernel, and the function to call."""

from __future__ import annotations

from slimkern.ops.packed_linear.api import packed_linear

__all__ = ["packed_linear"]
