"""The equation on the C++ kernels.

The mask is applied while the weight is packed; steps of the reduction that a panel of it has
nothing in are left out, and tiles of dW without a kept block are not computed.
"""

from __future__ import annotations

from torch import Tensor

from slimkern.ops import _plain
from slimkern.ops._block_mask import BlockMask


def block_masked_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, bits: Tensor, bn: int, bk: int
) -> Tensor:
    """y = x @ (W ∘ mask)ᵀ + b: x [M, K] -> y [M, N]."""
    N, K = weight.shape
    return _plain.linear(x, weight, bias, mask=BlockMask(bits, (bn, bk), (N, K)))


def block_masked_linear_dx(
    grad_y: Tensor, weight: Tensor, bits: Tensor, bn: int, bk: int
) -> Tensor:
    """dx = dy @ (W ∘ mask): dy [M, N] -> dx [M, K]."""
    N, K = weight.shape
    return _plain.linear(grad_y, weight, mask=BlockMask(bits, (bn, bk), (N, K)), turned=True)


def block_masked_linear_dw(
    grad_y: Tensor, x: Tensor, bits: Tensor, bn: int, bk: int, N: int, K: int
) -> Tensor:
    """dW = (dyᵀ x) ∘ mask: [N, K] in the dtype of x."""
    return _plain.gradient(grad_y, x, (N, K), mask=BlockMask(bits, (bn, bk), (N, K)))
