"""The op ``masked_ffn``: a feed-forward block of which only some channels are computed."""

from __future__ import annotations

from slimkern.ops._registry import compose
from slimkern.ops.masked_ffn.api import masked_ffn

compose("masked_ffn", ("indexed_linear", "activation", "add_norm", "seeded_dropout"))

__all__ = ["masked_ffn"]
