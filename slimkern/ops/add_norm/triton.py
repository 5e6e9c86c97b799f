"""The equation on GPUs: a row stays in registers between its sums and its results.

Dropout is taken on the way, so that what it leaves of x is never stored. The sums over tokens are
taken in two stages: each program adds up its own slice, and the slices, whose number follows from
the sizes alone, are added in their order: no atomics, so results are the same from run to run.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code has no Python types: its arguments are pointers, tensors or constants by turns.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkern.ops._launch import launch
from slimkern.ops._rows import drop_threshold, kept_by_seed, row_slices, unit_rows
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
def _add_norm_fwd_kernel(
    x_ptr, residual_ptr, gamma_ptr, beta_ptr, seed_ptr, y_ptr, s_ptr, stats_ptr,
    M, N, eps, threshold, kept_scale, stride_xm, stride_rm,
    DROPS: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``ROWS`` rows of ``s = drop(x) + residual`` and ``y = (s - mean) * scale * gamma + beta``."""
    size = N
    N = with_alignment(N, ALIGN)
    stride_xm = with_alignment(stride_xm, ALIGN)
    stride_rm = with_alignment(stride_rm, ALIGN)
    offs_m = offsets(tl.program_id(0), ROWS)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_m = offs_m < M
    mask_n = offs_n < N
    x = load_tile(x_ptr, offs_m, stride_xm, mask_m, offs_n, 1, mask_n)
    residual = load_tile(residual_ptr, offs_m, stride_rm, mask_m, offs_n, 1, mask_n)
    gamma = tl.load(gamma_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)

    x = x.to(tl.float32)
    if DROPS:
        number = (offs_m * N)[:, None] + offs_n[None, :]
        x = tl.where(kept_by_seed(number, tl.load(seed_ptr), threshold), x * kept_scale, 0.0)
    s = x + residual.to(tl.float32)
    mean = tl.sum(s, axis=1) / size
    centred = tl.where(mask_n[None, :], s - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1) / size + eps)
    y = centred * scale[:, None] * gamma[None, :] + beta[None, :]

    store_tile(y_ptr, y, offs_m, N, mask_m, offs_n, 1, mask_n)
    store_tile(s_ptr, s, offs_m, N, mask_m, offs_n, 1, mask_n)
    tl.store(stats_ptr + offs_m * 3, mean, mask=mask_m)
    tl.store(stats_ptr + offs_m * 3 + 1, scale, mask=mask_m)
    tl.store(stats_ptr + offs_m * 3 + 2, tl.zeros_like(mean), mask=mask_m)


@triton.jit
def _add_norm_grad_kernel(
    grad_ptr, s_ptr, stats_ptr, gamma_ptr, seed_ptr, ds_ptr, dx_ptr, part_ptr,
    M, N, chunk, threshold, kept_scale, stride_gm, stride_sm,
    DROPS: tl.constexpr, APART: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradients of slice ``program_id(0)`` of the tokens, and its three sums over them.

    With ``APART`` that of x is written beside that of the residual.
    """
    size = N
    N = with_alignment(N, ALIGN)
    stride_gm = with_alignment(stride_gm, ALIGN)
    stride_sm = with_alignment(stride_sm, ALIGN)
    piece = tl.cast(tl.program_id(0), tl.int64)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_n = offs_n < N
    begin = piece * chunk
    end = tl.minimum(begin + chunk, M)
    gamma = tl.load(gamma_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)

    d_gamma = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    d_beta = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    total = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)
    for block in range(tl.cdiv(end - begin, ROWS)):
        offs_m = begin + offsets(block, ROWS)
        mask_m = offs_m < end
        grad = load_tile(grad_ptr, offs_m, stride_gm, mask_m, offs_n, 1, mask_n).to(tl.float32)
        s = load_tile(s_ptr, offs_m, stride_sm, mask_m, offs_n, 1, mask_n)
        center = tl.load(stats_ptr + offs_m * 3, mask=mask_m, other=0.0)
        scale = tl.load(stats_ptr + offs_m * 3 + 1, mask=mask_m, other=0.0)
        offset = tl.load(stats_ptr + offs_m * 3 + 2, mask=mask_m, other=0.0)
        z = (s - center[:, None]) * scale[:, None] + offset[:, None]
        g = grad * gamma[None, :]  # zero beyond the row, so that z needs no mask there
        mean_g = tl.sum(g, axis=1) / size
        mean_gz = tl.sum(g * z, axis=1) / size
        ds = scale[:, None] * (g - mean_g[:, None] - z * mean_gz[:, None])
        store_tile(ds_ptr, ds, offs_m, N, mask_m, offs_n, 1, mask_n)
        d_gamma += grad * z
        d_beta += grad
        if DROPS:
            number = (offs_m * N)[:, None] + offs_n[None, :]
            kept = kept_by_seed(number, tl.load(seed_ptr), threshold)
            ds = tl.where(kept, ds * kept_scale, 0.0)
        if APART:
            store_tile(dx_ptr, ds, offs_m, N, mask_m, offs_n, 1, mask_n)
        total += ds  # beyond the row it is no sum of the tensor's, and is not stored

    base = part_ptr + piece * 3 * N + offs_n
    tl.store(base, tl.sum(d_gamma, axis=0), mask=mask_n)
    tl.store(base + N, tl.sum(d_beta, axis=0), mask=mask_n)
    tl.store(base + 2 * N, tl.sum(total, axis=0), mask=mask_n)


def _tile(N: int, each: int) -> Tile:
    """Rows of ``N`` entries, as many at a time as leave ``each`` of them to a thread.

    So few that the registers let two programs share a multiprocessor: one computes while the other
    waits for memory.
    """
    width = max(bucket(N), 16)
    rows = max(256 * each // width, 1)
    warps = min(max(width * rows // (32 * each), 4), 16)
    return Tile(min(rows, 16), width, 1, warps=warps, stages=2)


def _drop(seed: Tensor | None, p: float) -> tuple[int, float]:
    """The kernels' threshold and factor; all is dropped where p is 1."""
    if seed is None:
        return 0, 1.0
    return drop_threshold(p), (0.0 if p == 1.0 else 1.0 / (1.0 - p))


def add_norm_fwd(
    x: Tensor,
    residual: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    seed: Tensor | None,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual [M, N], gamma, beta [N] -> y in residual's dtype, s [M, N], stats [M, 3].

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    check_dtype("x", x)
    check_dtype("residual", residual)
    x, residual = unit_rows(x), unit_rows(residual)
    M, N = residual.shape
    y = torch.empty((M, N), dtype=residual.dtype, device=x.device)
    s = torch.empty((M, N), dtype=torch.float32, device=x.device)
    stats = torch.empty((M, 3), dtype=torch.float32, device=x.device)
    if M == 0 or N == 0:
        return y, s, stats.zero_()
    tile, (threshold, scale) = _tile(N, 16), _drop(seed, p)
    launch(_add_norm_fwd_kernel, (triton.cdiv(M, tile.a),), x)(
        x, residual, gamma.contiguous(), beta.contiguous(), seed, y, s, stats,
        M, N, eps, threshold, scale, x.stride(0), residual.stride(0),
        DROPS=seed is not None, ALIGN=alignment(N, x.stride(0), residual.stride(0)),
        ROWS=tile.a, BLOCK_N=tile.b,
        **launch_options(tile),
    )  # fmt: skip
    return y, s, stats


def add_norm_grad(
    grad: Tensor,
    s: Tensor,
    stats: Tensor,
    gamma: Tensor,
    narrow: bool,
    seed: Tensor | None,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad, s [M, N] -> ds in grad's dtype, that of x where it is another tensor, sums [3, N].

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    check_dtype("grad", grad)
    grad, s = unit_rows(grad), unit_rows(s)
    M, N = s.shape
    apart = narrow or seed is not None
    ds = torch.empty((M, N), dtype=grad.dtype, device=s.device)
    kind = torch.bfloat16 if narrow else grad.dtype
    dx = torch.empty((M, N) if apart else (0,), dtype=kind, device=s.device)
    if M == 0 or N == 0:
        return ds, dx, torch.zeros((3, N), dtype=torch.float32, device=s.device)
    tile, (threshold, scale) = _tile(N, 8), _drop(seed, p)
    slices, chunk = row_slices(2, M, tile.a)
    part = torch.empty((slices, 3, N), dtype=torch.float32, device=s.device)
    launch(_add_norm_grad_kernel, (slices,), s)(
        grad, s, stats.contiguous(), gamma.contiguous(), seed, ds, dx, part,
        M, N, chunk, threshold, scale, grad.stride(0), s.stride(0),
        DROPS=seed is not None, APART=apart, ALIGN=alignment(N, grad.stride(0), s.stride(0)),
        ROWS=tile.a, BLOCK_N=tile.b,
        **launch_options(tile),
    )  # fmt: skip
    return ds, dx, part.sum(0)
