"""Calls of the C++ linears on weights as they are: what forward and backward in training need.

Results and scratch are allocated here, nothing there. Kept rows and columns are gathered, and
blocks masked, while the weight is packed. The products are computed as `choose_math` says for the
storage type, by PyTorch's setting at the time of the call; float64, which serves checks, runs on a
plain matrix product. What C++ can check itself (indices, sizes of masks, scratch) it checks there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slimkern.ops import _native
from slimkern.ops._block_mask import BlockMask
from slimkern.ops._math import choose_math
from slimkern.ops._native import Mat, Vec, mat, transposed, vec

# Where the kernels are at least as fast as torch: not in portable code, and not in float64.
_VECTORS = len(_native.available_isas()) > 1
FAST = {("cpu", dtype): "cpu" for dtype in (torch.float32, torch.bfloat16) if _VECTORS}

Bits = tuple[int, int, int, int, int, int, int]
_ALL: Bits = (0, 0, 0, 1, 1, 0, 0)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
    mask: BlockMask | None = None,
    turned: bool = False,
) -> Tensor:
    """``y = x @ Vᵀ + bias[rows]`` with V = ``weight[rows][:, cols]``, or its transpose.

    Args:
        x: [M, K]; any strides.
        weight: stored [outputs, inputs]; any strides.
        bias: one per row of weight, or None.
        rows, cols: kept rows and columns of weight, int64, or None for all.
        mask: of the weight, instead of rows and cols; or None.
        turned: V is the transpose: what dx = dy @ W needs.

    Returns:
        [M, N] in the dtype of x, without gaps.

    Raises:
        IndexError: an index is not strictly increasing within the weight.
        TypeError: the kernels do not know the dtype.
    """
    dtype = _native.dtype_code(x, "x")
    rows, cols = _index(rows), _index(cols)
    if x.dtype == torch.float64:
        return _double_linear(x, _kept(weight, mask), bias, rows, cols, turned)
    view = mat(weight, rows, cols)
    N = _count(rows, weight.shape[0])
    if turned:
        view = transposed(view)
        N = _count(cols, weight.shape[1])
    x = _unit_rows(x)
    M, K = x.shape
    y = torch.empty((M, N), dtype=x.dtype)
    shift = _native.NO_VECTOR if bias is None else vec(bias, rows)
    bits, memory = _bits(mask)
    call = (dtype, _math(x.dtype), M, N, K)
    arguments = (call, (x.data_ptr(), x.stride(0)), view, shift, bits, turned, y.data_ptr())
    _run(_native.plain_linear_scratch, _native.plain_linear, arguments)
    del memory
    return y


def gradient(
    grad_y: Tensor,
    x: Tensor,
    shape: tuple[int, int],
    *,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
    mask: BlockMask | None = None,
) -> Tensor:
    """``dW[rows][:, cols] = grad_yᵀ @ x`` of a weight of ``shape``; zero elsewhere.

    Args:
        grad_y: [M, R]; any strides.
        x: [M, C]; any strides.
        shape: (N, K) of the weight.
        rows, cols: kept rows and columns, int64, or None for all.
        mask: of the weight, instead of rows and cols; or None.

    Returns:
        [N, K] in the dtype of x.

    Raises:
        IndexError: an index is not strictly increasing within the weight.
        TypeError: the kernels do not know the dtype.
    """
    dtype = _native.dtype_code(x, "x")
    rows, cols = _index(rows), _index(cols)
    whole = rows is None and cols is None
    dw = torch.empty(shape, dtype=x.dtype) if whole else x.new_zeros(shape)
    M, R, C = x.shape[0], grad_y.shape[1], x.shape[1]
    if x.dtype == torch.float64:
        _gemm(transposed(mat(grad_y)), mat(x), mat(dw, rows, cols), _native.NO_VECTOR, R, C, M)
        return _kept(dw, mask)
    grad_y, x = _unit_rows(grad_y), _unit_rows(x)
    bits, memory = _bits(mask)
    arguments = (
        (dtype, _math(x.dtype), M, R, C),
        (grad_y.data_ptr(), grad_y.stride(0)),
        (x.data_ptr(), x.stride(0)),
        mat(dw, rows, cols),
        bits,
    )
    _run(_native.plain_gradient_scratch, _native.plain_gradient, arguments)
    del memory
    return dw


def _run(size: Callable[..., int], call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    threads = _native.threads()
    floats = -(-size(*arguments, threads) // 4)
    scratch = torch.empty(floats, dtype=torch.float32)
    call(*arguments, threads, (scratch.data_ptr(), 4 * floats))


def _math(dtype: torch.dtype) -> int:
    return _native.MATHS[choose_math(dtype)]


def _index(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.contiguous()


def _count(index: Tensor | None, size: int) -> int:
    return size if index is None else index.shape[0]


def _unit_rows(x: Tensor) -> Tensor:
    """Rows without gaps between elements; expanded ones are copied."""
    return x if x.stride(1) == 1 else x.contiguous()


def _bits(mask: BlockMask | None) -> tuple[Bits, Tensor | None]:
    """The mask as C++ reads it, and what keeps that memory alive."""
    if mask is None:
        return _ALL, None
    bits = mask.bits.contiguous()
    # An empty tensor has no address, and no address means that everything is kept: so it is.
    return (bits.data_ptr(), *bits.shape, *mask.block, *mask.shape), bits


def _kept(weight: Tensor, mask: BlockMask | None) -> Tensor:
    return weight if mask is None else weight.masked_fill(~mask.dense(), 0)


def _double_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor | None,
    cols: Tensor | None,
    turned: bool,
) -> Tensor:
    view = mat(weight, rows, cols)
    view = view if turned else transposed(view)
    N = _count(cols, weight.shape[1]) if turned else _count(rows, weight.shape[0])
    y = torch.empty((x.shape[0], N), dtype=x.dtype)
    shift = _native.NO_VECTOR if bias is None else vec(bias, rows)
    _gemm(mat(x), view, mat(y), shift, x.shape[0], N, x.shape[1])
    return y


def _gemm(a: Mat, b: Mat, c: Mat, bias: Vec, M: int, N: int, K: int) -> None:
    """c[m, n] = sum over k of a[m, k] * b[k, n], + bias[n], in double."""
    threads = _native.threads()
    size = _native.gemm_scratch(M, N, K, threads)
    scratch = torch.empty(size, dtype=torch.float64)
    _native.gemm(a, b, c, bias, M, N, K, threads, scratch.data_ptr(), size)
