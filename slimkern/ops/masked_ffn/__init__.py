"""The op ``masked_ffn``: a feed-forward block of which only some channels are computed."""

from __future__ import annotations

from slimkern.ops.masked_ffn.api import masked_ffn

__all__ = ["masked_ffn"]
