"""The equation on the Triton kernels: attention, then the FFN on its rows."""

from __future__ import annotations

from torch import Tensor

from slimkern.ops._device_blocks import Block, attention, ffn


def encoder_layer(
    x: Tensor, packed: list[Tensor], spec: str, mask: Tensor | None, head_bias: Tensor | None
) -> Tensor:
    """x [B, T, hidden] -> [B, T, hidden]."""
    block = Block(packed, spec, x)
    if x.numel() == 0:
        return block.like(x)
    y, low = attention(block, x, mask, head_bias, last=False)
    return ffn(block, y, low, mask, x.shape[1]).view(x.shape)
