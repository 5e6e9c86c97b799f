"""The equation in plain torch, for any device and floating dtype; the oracle of the kernels.

    y = x @ (W ∘ mask)ᵀ + b

x [M, K], W [N, K], mask per block of W (`slimkern.ops.BlockMask`), b [N], y [M, N]. What is masked
takes no part: a NaN there does not reach the result.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from slimkern.ops._block_mask import BlockMask


def _masked(weight: Tensor, bits: Tensor, bn: int, bk: int) -> Tensor:
    """weight [N, K] with zeros where it is masked."""
    N, K = weight.shape
    return weight.masked_fill(~BlockMask(bits, (bn, bk), (N, K)).dense(), 0)


def block_masked_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, bits: Tensor, bn: int, bk: int
) -> Tensor:
    """y = x @ (W ∘ mask)ᵀ + b: x [M, K] -> y [M, N]."""
    return F.linear(x, _masked(weight, bits, bn, bk), bias)


def block_masked_linear_dx(
    grad_y: Tensor, weight: Tensor, bits: Tensor, bn: int, bk: int
) -> Tensor:
    """dx = dy @ (W ∘ mask): dy [M, N] -> dx [M, K]."""
    return grad_y @ _masked(weight, bits, bn, bk)


def block_masked_linear_dw(
    grad_y: Tensor, x: Tensor, bits: Tensor, bn: int, bk: int, N: int, K: int
) -> Tensor:
    """dW = (dyᵀ x) ∘ mask: [N, K] in the dtype of x."""
    return _masked(grad_y.t() @ x, bits, bn, bk)
