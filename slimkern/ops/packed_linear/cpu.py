"""The equation on the C++ kernels."""

from __future__ import annotations

from torch import Tensor

from slimkern.ops import _fused


def packed_linear(x: Tensor, packed: list[Tensor], spec: str, N: int) -> Tensor:
    """x [M, K] -> [M, N]."""
    return _fused.flat(x, packed[0], N)
