"""The equation on the Triton kernels."""

from __future__ import annotations

from torch import Tensor

from slimkern.ops import _device_blocks


def packed_linear(x: Tensor, packed: list[Tensor], spec: str, N: int) -> Tensor:
    """x [M, K] -> [M, N]."""
    return _device_blocks.linear(x, packed, spec, N)
