"""The op ``masked_attention``: attention of which only some heads are computed."""

from __future__ import annotations

from slimkern.ops.masked_attention.api import Kept, masked_attention

__all__ = ["Kept", "masked_attention"]
