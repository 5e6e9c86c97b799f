"""The op ``block_masked_linear``: a linear layer whose weight is masked block by block."""

from __future__ import annotations

from slimkern.ops.block_masked_linear.api import block_masked_linear

__all__ = ["block_masked_linear"]
