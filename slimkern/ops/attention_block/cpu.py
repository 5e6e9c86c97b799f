"""The equation on the C++ kernels: scores exist for a block of queries and keys at a time."""

from __future__ import annotations

from torch import Tensor

from slimkern.ops import _fused


def attention_block(
    x: Tensor, packed: list[Tensor], spec: str, mask: Tensor | None, head_bias: Tensor | None
) -> Tensor:
    """x [B, T, hidden] -> [B, T, hidden]."""
    return _fused.layer(x, packed[0], mask, head_bias)
