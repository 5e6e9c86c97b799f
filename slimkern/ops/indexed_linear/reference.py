"""The equation in plain torch, for any device and floating dtype; the oracle of the kernels.

    y = x @ W[rows][:, cols]ᵀ + b[rows]

``rows`` and ``cols`` are sorted unique int64 vectors, or None for "all". With R kept rows and C
kept columns: x [M, C], W [N, K], b [N], y [M, R].

It also trains models on CPU, so that each gather and scatter is the form that torch runs fast.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def _gather(weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """W[rows][:, cols], [R, C]; the weight itself where both are None."""
    if rows is not None:
        weight = weight.index_select(0, rows)
    if cols is None:
        return weight
    if weight.dtype.itemsize > 2:
        return weight.index_select(1, cols)
    # Along columns, index_select is fast for float32 alone; the way there and back is exact.
    return weight.float().index_select(1, cols).to(weight.dtype)


def indexed_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, cols: Tensor | None
) -> Tensor:
    """y = x @ W[rows][:, cols]ᵀ + b[rows]: x [M, C] -> y [M, R]."""
    if bias is not None and rows is not None:
        bias = bias.index_select(0, rows)
    return F.linear(x, _gather(weight, rows, cols), bias)


def indexed_linear_dx(
    grad_y: Tensor, weight: Tensor, rows: Tensor | None, cols: Tensor | None
) -> Tensor:
    """dx = dy @ W[rows][:, cols]: dy [M, R] -> dx [M, C]."""
    return grad_y @ _gather(weight, rows, cols)


def indexed_linear_dw(
    grad_y: Tensor, x: Tensor, rows: Tensor | None, cols: Tensor | None, N: int, K: int
) -> Tensor:
    """dW[rows[r], cols[c]] = (dyᵀ x)[r, c], zero elsewhere: [N, K] in the dtype of x."""
    grad = grad_y.t() @ x
    if cols is not None:
        # scatter_ along columns runs in less than half the time of index_copy_.
        kept = grad
        grad = x.new_zeros(kept.shape[0], K).scatter_(1, cols.expand(kept.shape[0], -1), kept)
    if rows is not None:
        grad = x.new_zeros(N, K).index_copy_(0, rows, grad)
    return grad


def indexed_linear_db(grad_y: Tensor, rows: Tensor | None, N: int) -> Tensor:
    """db[rows] = sum of dy over tokens, zero elsewhere: [N] in the dtype of dy."""
    grad = grad_y.sum(0)
    if rows is None:
        return grad
    return grad_y.new_zeros(N).index_copy_(0, rows, grad)
