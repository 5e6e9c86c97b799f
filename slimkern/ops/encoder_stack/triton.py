"""The layers on the Triton kernels, one after the other."""

from __future__ import annotations

from torch import Tensor

from slimkern.ops._device_pack import read_spec
from slimkern.ops.encoder_layer.triton import encoder_layer


def encoder_stack(
    x: Tensor,
    packed: list[Tensor],
    specs: list[str],
    mask: Tensor | None,
    head_bias: Tensor | None,
) -> Tensor:
    """x [B, T, hidden] -> [B, T, hidden]; a layer's specification names its tensors."""
    at = 0
    for spec in specs:
        count = len(read_spec(spec).names)
        x = encoder_layer(x, packed[at : at + count], spec, mask, head_bias)
        at += count
    return x
