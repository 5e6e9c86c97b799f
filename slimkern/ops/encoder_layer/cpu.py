"""The equation on the C++ kernels: a group of sequences at a time, from attention to FFN."""

from __future__ import annotations

from torch import Tensor

from slimkern.ops import _fused


def encoder_layer(
    x: Tensor, packed: list[Tensor], spec: str, mask: Tensor | None, head_bias: Tensor | None
) -> Tensor:
    """x [B, T, hidden] -> [B, T, hidden]."""
    return _fused.layer(x, packed[0], mask, head_bias)
