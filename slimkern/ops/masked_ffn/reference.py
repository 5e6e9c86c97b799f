"""The equation in plain torch, differentiated by torch: the oracle of the block.

y = post(x + fc2[:, keep](a(fc1[keep](x))))
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from slimkern.ops._weights import FfnWeights, LinearWeights
from slimkern.ops.ffn.reference import ffn


def masked_ffn(x: Tensor, weights: FfnWeights, keep: Tensor | None = None) -> Tensor:
    """x [..., hidden] -> [..., hidden], by the channels ``keep`` alone."""
    if keep is None:
        return ffn(x, weights)
    fc1, fc2 = weights.fc1, weights.fc2
    bias = None if fc1.bias is None else fc1.bias[keep]
    first = LinearWeights(fc1.weight[keep], bias)
    return ffn(x, replace(weights, fc1=first, fc2=LinearWeights(fc2.weight[:, keep], fc2.bias)))
