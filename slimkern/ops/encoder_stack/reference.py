"""The equation in plain torch, from ordinary weights: the oracle of the kernels.

y = encoder_layer_n(... encoder_layer_1(x))
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from slimkern.ops._weights import EncoderLayerWeights
from slimkern.ops.encoder_layer.reference import encoder_layer


def encoder_stack(
    x: Tensor,
    weights: Sequence[EncoderLayerWeights],
    mask: Tensor | None = None,
    head_bias: Tensor | None = None,
) -> Tensor:
    """x [B, T, hidden] -> y [B, T, hidden]; the masks are those of the op."""
    for layer in weights:
        x = encoder_layer(x, layer, mask, head_bias)
    return x
