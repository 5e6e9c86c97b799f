"""The equation in plain torch: the oracle of the kernel.

    y = x @ Wᵀ + b

x [..., K], W [N, K], b [N] or None, y [..., N].
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from slimkern.ops._weights import LinearWeights


def packed_linear(x: Tensor, weights: LinearWeights) -> Tensor:
    """y = x @ Wᵀ + b: [..., K] -> [..., N]."""
    return F.linear(x, weights.weight, weights.bias)
