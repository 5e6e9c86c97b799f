"""The equation in plain torch, from ordinary weights: the oracle of the kernel.

    y = ffn(attention_block(x))

with the rows that the mask takes out at the end of a sequence zero in y.
"""

from __future__ import annotations

from torch import Tensor

from slimkern.ops._weights import EncoderLayerWeights
from slimkern.ops.attention_block.reference import attention_block, key_mask, valid_rows
from slimkern.ops.ffn.reference import ffn


def encoder_layer(
    x: Tensor,
    weights: EncoderLayerWeights,
    mask: Tensor | None = None,
    head_bias: Tensor | None = None,
) -> Tensor:
    """x [B, T, hidden] -> y [B, T, hidden]; the masks are those of the op."""
    y = ffn(attention_block(x, weights.attention, mask, head_bias), weights.ffn)
    return y.masked_fill(~valid_rows(key_mask(mask, x))[..., None], 0.0)
