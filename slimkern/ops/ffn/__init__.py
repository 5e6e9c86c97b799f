"""A feed-forward block in one call: its equation, its kernel, and the function to call."""

from __future__ import annotations

from slimkern.ops.ffn.api import ffn

__all__ = ["ffn"]
