"""The equation on the C++ kernels: outputs and scratch are allocated here, nothing there.

Kept rows and columns are gathered while the operands are packed, and scattered on the store.
Operands may have any strides. The indices are checked against the bounds in C++ on every call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimkern.ops import _native
from slimkern.ops._native import Mat, Vec, mat, transposed, vec


def _gemm(like: Tensor, a: Mat, b: Mat, c: Mat, bias: Vec, M: int, N: int, K: int) -> None:
    """c[m, n] = sum over k of a[m, k] * b[k, n], + bias[n], in the storage type of ``like``."""
    code = _native.dtype_code(like, "x")
    threads = _native.threads()
    compute = torch.float64 if like.dtype == torch.float64 else torch.float32
    size = _native.gemm_scratch(code, M, N, K, threads)
    scratch = torch.empty(size, dtype=compute)
    _native.gemm(code, a, b, c, bias, M, N, K, threads, scratch.data_ptr(), size)


def _count(index: Tensor | None, size: int) -> int:
    return size if index is None else index.shape[0]


def _index(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.contiguous()


def _full(like: Tensor, shape: tuple[int, ...], dense: bool) -> Tensor:
    """Where a gradient is scattered to: every element is written only if nothing is left out."""
    return torch.empty(shape, dtype=like.dtype) if dense else like.new_zeros(shape)


def indexed_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, cols: Tensor | None
) -> Tensor:
    """y = x @ W[rows][:, cols]ᵀ + b[rows]: x [M, C] -> y [M, R]."""
    rows, cols = _index(rows), _index(cols)
    M, K = x.shape
    N = _count(rows, weight.shape[0])
    y = torch.empty((M, N), dtype=x.dtype)
    shift = _native.NO_VECTOR if bias is None else vec(bias, rows)
    _gemm(x, mat(x), transposed(mat(weight, rows, cols)), mat(y), shift, M, N, K)
    return y


def indexed_linear_dx(
    grad_y: Tensor, weight: Tensor, rows: Tensor | None, cols: Tensor | None
) -> Tensor:
    """dx = dy @ W[rows][:, cols]: dy [M, R] -> dx [M, C]."""
    rows, cols = _index(rows), _index(cols)
    M, K = grad_y.shape
    N = _count(cols, weight.shape[1])
    dx = torch.empty((M, N), dtype=grad_y.dtype)
    _gemm(grad_y, mat(grad_y), mat(weight, rows, cols), mat(dx), _native.NO_VECTOR, M, N, K)
    return dx


def indexed_linear_dw(
    grad_y: Tensor, x: Tensor, rows: Tensor | None, cols: Tensor | None, N: int, K: int
) -> Tensor:
    """dW[rows[r], cols[c]] = (dyᵀ x)[r, c], zero elsewhere: [N, K] in the dtype of x."""
    rows, cols = _index(rows), _index(cols)
    dw = _full(x, (N, K), dense=rows is None and cols is None)
    m, (tokens, n) = grad_y.shape[1], x.shape
    a = transposed(mat(grad_y))
    _gemm(x, a, mat(x), mat(dw, rows, cols), _native.NO_VECTOR, m, n, tokens)
    return dw


def indexed_linear_db(grad_y: Tensor, rows: Tensor | None, N: int) -> Tensor:
    """db[rows] = sum of dy over tokens, zero elsewhere: [N] in the dtype of dy."""
    rows = _index(rows)
    db = _full(grad_y, (N,), dense=rows is None)
    code = _native.dtype_code(grad_y, "grad_y")
    M, R = grad_y.shape
    _native.column_sum(code, mat(grad_y), M, R, vec(db, rows), _native.threads())
    return db
