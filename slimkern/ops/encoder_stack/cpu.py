"""The layers on the C++ kernels, one call for all of them."""

from __future__ import annotations

from torch import Tensor

from slimkern.ops import _fused


def encoder_stack(
    x: Tensor,
    packed: list[Tensor],
    specs: list[str],
    mask: Tensor | None,
    head_bias: Tensor | None,
) -> Tensor:
    """x [B, T, hidden] -> [B, T, hidden]; each layer has one tensor and no specification."""
    return _fused.layers(x, packed, mask, head_bias)
