"""The op ``masked_attention``: attention of which only some heads are computed."""

from __future__ import annotations

from slimkern.ops._registry import compose
from slimkern.ops.masked_attention.api import Kept, masked_attention

compose("masked_attention", ("indexed_linear", "add_norm", "seeded_dropout"))

__all__ = ["Kept", "masked_attention"]
