"""Products of differing widths in one launch: the tiles of all problems are one row of programs."""

# mypy: disable-error-code="no-untyped-def"
# Device code has no Python types: its arguments are pointers, tensors or constants by turns.

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkern.ops._gemm_configs import GROUP, tiles_for
from slimkern.ops._gemm_kernels import multiply
from slimkern.ops._launch import launch
from slimkern.ops._tile import (
    alignment,
    bucket,
    check_dtype,
    choose_tile,
    contiguous,
    launch_options,
    offsets,
    precision,
    store_tile,
    swizzle,
    with_alignment,
)

# The programs of a launch look through the list of its problems, so that it is kept short.
MOST = 8


@triton.jit
def _grouped_kernel(
    x_ptrs, w_ptrs, b_ptrs, y_ptrs, sizes, strides,
    COUNT: tl.constexpr, HAS_BIAS: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of one of ``COUNT`` problems ``y = x @ W^T + b``.

    The first four arguments are tuples of pointers; ``sizes`` holds M, N, K and ``strides`` those
    of the rows of x, W and y for each problem in turn. The problem is picked by selection, so that
    the product itself is compiled once.
    """
    pid = tl.program_id(0)
    x_ptr, w_ptr, b_ptr, y_ptr = x_ptrs[0], w_ptrs[0], b_ptrs[0], y_ptrs[0]
    M, N, K = sizes[0], sizes[1], sizes[2]
    stride_xm, stride_wn, stride_ym = strides[0], strides[1], strides[2]
    begin = tl.cdiv(sizes[0], BLOCK_M) * tl.cdiv(sizes[1], BLOCK_N)
    first = begin * 0
    for i in tl.static_range(1, COUNT):
        here = pid >= begin
        x_ptr = tl.where(here, x_ptrs[i], x_ptr)
        w_ptr = tl.where(here, w_ptrs[i], w_ptr)
        if HAS_BIAS:
            b_ptr = tl.where(here, b_ptrs[i], b_ptr)
        y_ptr = tl.where(here, y_ptrs[i], y_ptr)
        M = tl.where(here, sizes[3 * i], M)
        N = tl.where(here, sizes[3 * i + 1], N)
        K = tl.where(here, sizes[3 * i + 2], K)
        stride_xm = tl.where(here, strides[3 * i], stride_xm)
        stride_wn = tl.where(here, strides[3 * i + 1], stride_wn)
        stride_ym = tl.where(here, strides[3 * i + 2], stride_ym)
        first = tl.where(here, begin, first)
        begin += tl.cdiv(sizes[3 * i], BLOCK_M) * tl.cdiv(sizes[3 * i + 1], BLOCK_N)
    stride_xm = with_alignment(stride_xm, ALIGN)
    stride_wn = with_alignment(stride_wn, ALIGN)
    stride_ym = with_alignment(stride_ym, ALIGN)
    pid_m, pid_n = swizzle(pid - first, tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    offs_m = offsets(pid_m, BLOCK_M)
    offs_n = offsets(pid_n, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    acc = multiply(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32),
        x_ptr + (offs_m * stride_xm)[:, None], 1, mask_m[:, None],
        w_ptr + (offs_n * stride_wn)[None, :], 1, mask_n[None, :],
        0, K, True, BLOCK_K, PRECISION, False, False,
    )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(b_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    store_tile(y_ptr, acc, offs_m, stride_ym, mask_m, offs_n, 1, mask_n)


def _unit(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def grouped_products(
    xs: Sequence[Tensor], ws: Sequence[Tensor], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """``x @ W^T + b`` for each of a list of problems of any sizes, as few launches as possible.

    Args:
        xs: [M, K] each; all of one dtype and on one device.
        ws: [N, K] each, of that dtype.
        biases: [N] of that dtype or None each.

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16, or several of them.
        ValueError: lists of differing lengths.
    """
    found: list[Tensor] = []
    problems = []
    for x, w, bias in zip(xs, ws, biases, strict=True):
        check_dtype("x", x)
        for name, tensor in (("x", x), ("w", w), ("bias", bias)):
            if tensor is not None and tensor.dtype != xs[0].dtype:
                given = f"{tensor.dtype} beside x of {xs[0].dtype}"
                raise TypeError(f"{name} has dtype {given}; accepted: one for all")
        y = torch.empty((x.shape[0], w.shape[0]), dtype=x.dtype, device=x.device)
        found.append(y)
        if y.numel():
            problems.append((_unit(x), _unit(w), contiguous(bias), y))
    for has_bias in (False, True):
        alike = [problem for problem in problems if (problem[2] is not None) == has_bias]
        for start in range(0, len(alike), MOST):
            _launch_group(alike[start : start + MOST], has_bias)
    return found


def _launch_group(
    problems: list[tuple[Tensor, Tensor, Tensor | None, Tensor]], has_bias: bool
) -> None:
    """One launch for problems that all have a bias, or none."""
    xs, ws, biases, ys = zip(*problems, strict=True)
    sizes = [size for x, w, _, _ in problems for size in (x.shape[0], w.shape[0], x.shape[1])]
    strides = [t.stride(0) for x, w, _, y in problems for t in (x, w, y)]
    align = alignment(*strides)
    # As if the problems lay side by side; the widest says how much a tile may pad.
    tile = choose_tile(tiles_for(xs[0], align), bucket(max(sizes[::3])), sum(sizes[1::3]))
    tiles = [
        triton.cdiv(M, tile.a) * triton.cdiv(N, tile.b)
        for M, N in zip(sizes[::3], sizes[1::3], strict=True)
    ]
    launch(_grouped_kernel, (sum(tiles),), xs[0])(
        xs, ws, biases, ys, tuple(sizes), tuple(strides),
        COUNT=len(problems), HAS_BIAS=has_bias, ALIGN=align, PRECISION=precision(xs[0].dtype),
        BLOCK_M=tile.a, BLOCK_N=tile.b, BLOCK_K=tile.k, GROUP=GROUP,
        **launch_options(tile),
    )  # fmt: skip
