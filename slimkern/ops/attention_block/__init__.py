"""Self-attention with its projections in one call."""

from __future__ import annotations

from slimkern.ops.attention_block.api import attention_block

__all__ = ["attention_block"]
