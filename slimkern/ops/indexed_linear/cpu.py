"""The equation on the C++ kernels.

Operands may have any strides. The indices are checked against the bounds in C++ on every call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimkern.ops import _native, _plain
from slimkern.ops._native import mat, vec


def indexed_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, cols: Tensor | None
) -> Tensor:
    """y = x @ W[rows][:, cols]ᵀ + b[rows]: x [M, C] -> y [M, R]."""
    return _plain.linear(x, weight, bias, rows=rows, cols=cols)


def indexed_linear_dx(
    grad_y: Tensor, weight: Tensor, rows: Tensor | None, cols: Tensor | None
) -> Tensor:
    """dx = dy @ W[rows][:, cols]: dy [M, R] -> dx [M, C]."""
    return _plain.linear(grad_y, weight, rows=rows, cols=cols, turned=True)


def indexed_linear_dw(
    grad_y: Tensor, x: Tensor, rows: Tensor | None, cols: Tensor | None, N: int, K: int
) -> Tensor:
    """dW[rows[r], cols[c]] = (dyᵀ x)[r, c], zero elsewhere: [N, K] in the dtype of x."""
    return _plain.gradient(grad_y, x, (N, K), rows=rows, cols=cols)


def indexed_linear_db(grad_y: Tensor, rows: Tensor | None, N: int) -> Tensor:
    """db[rows] = sum of dy over tokens, zero elsewhere: [N] in the dtype of dy."""
    rows = None if rows is None else rows.contiguous()
    db = torch.empty(N, dtype=grad_y.dtype) if rows is None else grad_y.new_zeros(N)
    code = _native.dtype_code(grad_y, "grad_y")
    M, R = grad_y.shape
    _native.column_sum(code, mat(grad_y), M, R, vec(db, rows), _native.threads())
    return db
