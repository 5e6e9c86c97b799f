"""The equation on GPUs: one pass over the tokens, and the sums over them in two stages.

Each program adds up its own slice of the tokens; the slices, whose number follows from the sizes
alone, are added in their order: no atomics, so results are the same from run to run.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code has no Python types: its arguments are pointers, tensors or constants by turns.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkern.ops._activations import activation_slope, activation_value
from slimkern.ops._launch import launch
from slimkern.ops._rows import row_slices, unit_rows
from slimkern.ops._tile import (
    Tile,
    alignment,
    bucket,
    check_dtype,
    launch_options,
    load_tile,
    offsets,
    store_tile,
    with_alignment,
)


@triton.jit
def _activation_fwd_kernel(
    x_ptr, y_ptr,
    M, N, stride_xm, stride_ym,
    NAME: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of ``y = a(x)``."""
    N = with_alignment(N, ALIGN)
    stride_xm = with_alignment(stride_xm, ALIGN)
    stride_ym = with_alignment(stride_ym, ALIGN)
    offs_m = offsets(tl.program_id(0), BLOCK_M)
    offs_n = offsets(tl.program_id(1), BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    x = load_tile(x_ptr, offs_m, stride_xm, mask_m, offs_n, 1, mask_n)
    store_tile(y_ptr, activation_value(x, NAME), offs_m, stride_ym, mask_m, offs_n, 1, mask_n)


@triton.jit
def _activation_grad_kernel(
    grad_ptr, x_ptr, dx_ptr, value_ptr, part_ptr,
    M, N, chunk, stride_gm, stride_xm, stride_ym,
    NAME: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``dx``, ``a(x)`` and the sum of dx of ``BLOCK_N`` columns and slice ``program_id(1)``."""
    N = with_alignment(N, ALIGN)
    stride_gm = with_alignment(stride_gm, ALIGN)
    stride_xm = with_alignment(stride_xm, ALIGN)
    stride_ym = with_alignment(stride_ym, ALIGN)
    piece = tl.cast(tl.program_id(1), tl.int64)
    offs_n = offsets(tl.program_id(0), BLOCK_N)
    mask_n = offs_n < N
    begin = piece * chunk
    end = tl.minimum(begin + chunk, M)

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for block in range(tl.cdiv(end - begin, BLOCK_M)):
        offs_m = begin + offsets(block, BLOCK_M)
        mask_m = offs_m < end
        grad = load_tile(grad_ptr, offs_m, stride_gm, mask_m, offs_n, 1, mask_n)
        x = load_tile(x_ptr, offs_m, stride_xm, mask_m, offs_n, 1, mask_n)
        dx = grad.to(tl.float32) * activation_slope(x, NAME)
        value = activation_value(x, NAME)
        store_tile(dx_ptr, dx, offs_m, stride_ym, mask_m, offs_n, 1, mask_n)
        store_tile(value_ptr, value, offs_m, stride_ym, mask_m, offs_n, 1, mask_n)
        total += dx
    tl.store(part_ptr + piece * N + offs_n, tl.sum(total, axis=0), mask=mask_n)


_TILE = Tile(16, 128, 1, warps=4, stages=2)


def _narrowed(N: int) -> Tile:
    """The tile for ``N`` columns, no wider than they are."""
    return _TILE._replace(b=min(_TILE.b, bucket(N)))


def activation_fwd(x: Tensor, activation: str) -> Tensor:
    """a(x), [M, N].

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    check_dtype("x", x)
    x = unit_rows(x)
    M, N = x.shape
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    tile = _narrowed(N)
    launch(_activation_fwd_kernel, (triton.cdiv(M, tile.a), triton.cdiv(N, tile.b)), x)(
        x, y,
        M, N, x.stride(0), N,
        NAME=activation, ALIGN=alignment(N, x.stride(0)), BLOCK_M=tile.a, BLOCK_N=tile.b,
        **launch_options(tile),
    )  # fmt: skip
    return y


def activation_grad(grad: Tensor, x: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """grad, x [M, N] -> dx [M, N], a(x) [M, N], the sum of dx over rows [N], float32.

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    check_dtype("x", x)
    check_dtype("grad", grad)
    grad, x = unit_rows(grad), unit_rows(x)
    M, N = x.shape
    dx, value = (torch.empty((M, N), dtype=x.dtype, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return dx, value, torch.zeros(N, dtype=torch.float32, device=x.device)
    tile = _narrowed(N)
    blocks = triton.cdiv(N, tile.b)
    slices, chunk = row_slices(blocks, M, tile.a)
    part = torch.empty((slices, N), dtype=torch.float32, device=x.device)
    launch(_activation_grad_kernel, (blocks, slices), x)(
        grad, x, dx, value, part,
        M, N, chunk, grad.stride(0), x.stride(0), N,
        NAME=activation, ALIGN=alignment(N, grad.stride(0), x.stride(0)),
        BLOCK_M=tile.a, BLOCK_N=tile.b,
        **launch_options(tile),
    )  # fmt: skip
    return dx, value, part.sum(0)
