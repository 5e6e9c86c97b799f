"""The equation on the Triton kernels, with torch's attention between its projections."""

from __future__ import annotations

from torch import Tensor

from slimkern.ops._device_blocks import Block, attention


def attention_block(
    x: Tensor, packed: list[Tensor], spec: str, mask: Tensor | None, head_bias: Tensor | None
) -> Tensor:
    """x [B, T, hidden] -> [B, T, hidden]."""
    block = Block(packed, spec, x)
    if x.numel() == 0:
        return block.like(x)
    return attention(block, x, mask, head_bias, last=True)[0].view(x.shape)
