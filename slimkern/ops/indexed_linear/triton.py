"""``indexed_linear`` on GPUs: launches of the products in ``slimkern.ops._gemm``.

The equations are those of ``reference.py``. ``W`` is ``[N, K]``; ``R`` and ``C`` are the numbers of
kept rows and columns (``N`` and ``K`` where there is no index vector), ``M`` the number of tokens.
Kept rows are gathered while tiles are loaded; where columns are kept, a compact copy of the kept
part is made first.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code has no Python types: its arguments are pointers, tensors or constants by turns.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkern.ops._gemm import kept_part, product, product_dw, product_dx, run_of, scatter_sum
from slimkern.ops._launch import launch
from slimkern.ops._tile import (
    Tile,
    alignment,
    check_dtype,
    contiguous,
    launch_options,
    load_tile,
    offsets,
    splits,
    with_alignment,
)


@triton.jit
def _column_sums_kernel(
    gy_ptr, out_ptr,
    M, R, chunk,
    stride_gm, stride_gr, stride_os,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """``BLOCK_R`` entries of the sum of ``grad_y`` over the tokens of slice ``program_id(1)``."""
    R = with_alignment(R, ALIGN)
    stride_gm = with_alignment(stride_gm, ALIGN)
    piece = tl.cast(tl.program_id(1), tl.int64)
    offs_r = offsets(tl.program_id(0), BLOCK_R)
    mask_r = offs_r < R
    begin = piece * chunk
    end = tl.minimum(begin + chunk, M)

    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for block in range(tl.cdiv(end - begin, BLOCK_M)):
        offs_m = begin + offsets(block, BLOCK_M)
        gy_tile = load_tile(gy_ptr, offs_m, stride_gm, offs_m < end, offs_r, stride_gr, mask_r)
        acc += gy_tile.to(tl.float32)

    tl.store(out_ptr + piece * stride_os + offs_r, tl.sum(acc, axis=0), mask=mask_r)


_SUM_TILE = Tile(32, 64, 1, warps=4, stages=2)


def indexed_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, cols: Tensor | None
) -> Tensor:
    """y = x @ W[rows][:, cols]ᵀ + b[rows]: x [M, C] -> y [M, R], any strides.

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    check_dtype("x", x)
    if cols is None and run_of(weight, rows, None) is None:
        return product(x, weight, bias, rows)
    return product(x, kept_part(weight, rows, cols), bias, rows, packed=True)


def indexed_linear_dx(
    grad_y: Tensor, weight: Tensor, rows: Tensor | None, cols: Tensor | None
) -> Tensor:
    """dx = dy @ W[rows][:, cols]: dy [M, R] -> dx [M, C], any strides.

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    check_dtype("x", grad_y)
    return product_dx(grad_y, kept_part(weight, rows, cols))


def indexed_linear_dw(
    grad_y: Tensor, x: Tensor, rows: Tensor | None, cols: Tensor | None, N: int, K: int
) -> Tensor:
    """dW[rows[r], cols[c]] = (dyᵀ x)[r, c], zero elsewhere: dy [M, R], x [M, C] -> [N, K].

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    return product_dw(grad_y, x, rows=rows, cols=cols, shape=(N, K))


def indexed_linear_db(grad_y: Tensor, rows: Tensor | None, N: int) -> Tensor:
    """db[rows] = sum of dy over tokens, zero elsewhere: dy [M, R] -> [N].

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    check_dtype("x", grad_y)
    rows = contiguous(rows)
    M, R = grad_y.shape
    grad_b = torch.empty((N,), dtype=grad_y.dtype, device=grad_y.device)
    if R == 0:
        return grad_b.zero_()
    programs, steps = triton.cdiv(R, _SUM_TILE.b), triton.cdiv(M, _SUM_TILE.a)
    S = splits(programs, steps)
    part = torch.empty((S, R), dtype=torch.float32, device=grad_y.device)
    launch(_column_sums_kernel, (programs, S), grad_y)(
        grad_y, part,
        M, R, triton.cdiv(steps, S) * _SUM_TILE.a,
        *grad_y.stride(), part.stride(0),
        ALIGN=alignment(R, grad_y.stride(0)), BLOCK_M=_SUM_TILE.a, BLOCK_R=_SUM_TILE.b,
        **launch_options(_SUM_TILE),
    )  # fmt: skip
    scatter_sum(part[:, None], 1, R, None, rows, grad_b[None])
    return grad_b
