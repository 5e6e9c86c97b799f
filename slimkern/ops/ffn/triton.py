"""The equation on the Triton kernels: activation and gate in the first product's epilogue, the
residual in the second's."""

from __future__ import annotations

from torch import Tensor

from slimkern.ops import _device_blocks
from slimkern.ops._device_blocks import Block, rows


def ffn(x: Tensor, packed: list[Tensor], spec: str) -> Tensor:
    """x [M, hidden] -> [M, hidden]."""
    return _device_blocks.ffn(Block(packed, spec, x), rows(x))
