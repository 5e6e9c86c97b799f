"""``indexed_linear`` on GPUs: kept rows and columns are gathered while tiles are loaded.

The equations are those of ``reference.py``. ``W`` is ``[N, K]``; ``R`` and ``C`` are the numbers of
kept rows and columns (``N`` and ``K`` where there is no index vector), ``M`` the number of tokens.
Every output element is one program's sum, or a fixed-order sum of slices: no atomics, so results
are the same from run to run.

The file is long because a kernel and the launcher that makes it promises are read together.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code has no Python types: its arguments are pointers, tensors or constants by turns.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkern.ops._tile import (
    Tile,
    alignment,
    bucket,
    check_dtype,
    choose_tile,
    contiguous,
    dot,
    gather_index,
    launch_options,
    load_tile,
    offsets,
    precision,
    splits,
    store_tile,
    swizzle,
    with_alignment,
    zeros_unless,
)


@triton.jit
def _indexed_linear_fwd_kernel(
    x_ptr, w_ptr, b_ptr, rows_ptr, cols_ptr, y_ptr,
    M, R, C,
    stride_xm, stride_xc, stride_wn, stride_wk, stride_b, stride_ym,
    HAS_ROWS: tl.constexpr, HAS_COLS: tl.constexpr, HAS_BIAS: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One ``[BLOCK_M, BLOCK_R]`` tile of ``y = x @ W[rows][:, cols]^T + b[rows]``."""
    R = with_alignment(R, ALIGN)
    C = with_alignment(C, ALIGN)
    stride_xm = with_alignment(stride_xm, ALIGN)
    stride_wn = with_alignment(stride_wn, ALIGN)
    stride_ym = with_alignment(stride_ym, ALIGN)
    pid_m, pid_r = swizzle(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(R, BLOCK_R), GROUP)
    offs_m = offsets(pid_m, BLOCK_M)
    offs_r = offsets(pid_r, BLOCK_R)
    mask_m = offs_m < M
    mask_r = offs_r < R
    rows = gather_index(rows_ptr, offs_r, mask_r, HAS_ROWS)

    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for block in range(tl.cdiv(C, BLOCK_C)):
        offs_c = offsets(block, BLOCK_C)
        mask_c = offs_c < C
        cols = gather_index(cols_ptr, offs_c, mask_c, HAS_COLS)
        x_tile = load_tile(x_ptr, offs_m, stride_xm, mask_m, offs_c, stride_xc, mask_c)
        w_tile = load_tile(w_ptr, cols, stride_wk, mask_c, rows, stride_wn, mask_r)
        acc = dot(x_tile, w_tile, acc, PRECISION)

    if HAS_BIAS:
        acc += tl.load(b_ptr + rows * stride_b, mask=mask_r, other=0.0).to(tl.float32)[None, :]
    store_tile(y_ptr, acc, offs_m, stride_ym, mask_m, offs_r, 1, mask_r)


@triton.jit
def _indexed_linear_bwd_dx_kernel(
    gy_ptr, w_ptr, rows_ptr, cols_ptr, gx_ptr,
    M, R, C,
    stride_gm, stride_gr, stride_wn, stride_wk, stride_xm,
    HAS_ROWS: tl.constexpr, HAS_COLS: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One ``[BLOCK_M, BLOCK_C]`` tile of ``grad_x = grad_y @ W[rows][:, cols]``."""
    R = with_alignment(R, ALIGN)
    C = with_alignment(C, ALIGN)
    stride_gm = with_alignment(stride_gm, ALIGN)
    stride_wn = with_alignment(stride_wn, ALIGN)
    stride_xm = with_alignment(stride_xm, ALIGN)
    pid_m, pid_c = swizzle(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(C, BLOCK_C), GROUP)
    offs_m = offsets(pid_m, BLOCK_M)
    offs_c = offsets(pid_c, BLOCK_C)
    mask_m = offs_m < M
    mask_c = offs_c < C
    cols = gather_index(cols_ptr, offs_c, mask_c, HAS_COLS)

    acc = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for block in range(tl.cdiv(R, BLOCK_R)):
        offs_r = offsets(block, BLOCK_R)
        mask_r = offs_r < R
        rows = gather_index(rows_ptr, offs_r, mask_r, HAS_ROWS)
        gy_tile = load_tile(gy_ptr, offs_m, stride_gm, mask_m, offs_r, stride_gr, mask_r)
        w_tile = load_tile(w_ptr, rows, stride_wn, mask_r, cols, stride_wk, mask_c)
        acc = dot(gy_tile, w_tile, acc, PRECISION)

    store_tile(gx_ptr, acc, offs_m, stride_xm, mask_m, offs_c, 1, mask_c)


@triton.jit
def _indexed_linear_bwd_dw_kernel(
    gy_ptr, x_ptr, rows_ptr, cols_ptr, out_ptr,
    M, R, C, chunk,
    stride_gm, stride_gr, stride_xm, stride_xc, stride_os, stride_on,
    HAS_ROWS: tl.constexpr, HAS_COLS: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One ``[BLOCK_R, BLOCK_C]`` tile of ``grad_y^T @ x`` over tokens of slice ``program_id(1)``.

    With a single slice ``out`` is the gradient itself, and the tile lands in its kept rows and
    columns; with several, ``out`` is a compact buffer per slice (and there are no index vectors).
    """
    R = with_alignment(R, ALIGN)
    C = with_alignment(C, ALIGN)
    stride_gm = with_alignment(stride_gm, ALIGN)
    stride_xm = with_alignment(stride_xm, ALIGN)
    stride_on = with_alignment(stride_on, ALIGN)
    pid_r, pid_c = swizzle(tl.program_id(0), tl.cdiv(R, BLOCK_R), tl.cdiv(C, BLOCK_C), GROUP)
    piece = tl.cast(tl.program_id(1), tl.int64)
    offs_r = offsets(pid_r, BLOCK_R)
    offs_c = offsets(pid_c, BLOCK_C)
    mask_r = offs_r < R
    mask_c = offs_c < C
    begin = piece * chunk
    end = tl.minimum(begin + chunk, M)

    acc = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for block in range(tl.cdiv(end - begin, BLOCK_M)):
        offs_m = begin + offsets(block, BLOCK_M)
        mask_m = offs_m < end
        gy_tile = load_tile(gy_ptr, offs_r, stride_gr, mask_r, offs_m, stride_gm, mask_m)
        x_tile = load_tile(x_ptr, offs_m, stride_xm, mask_m, offs_c, stride_xc, mask_c)
        acc = dot(gy_tile, x_tile, acc, PRECISION)

    rows = gather_index(rows_ptr, offs_r, mask_r, HAS_ROWS)
    cols = gather_index(cols_ptr, offs_c, mask_c, HAS_COLS)
    store_tile(out_ptr + piece * stride_os, acc, rows, stride_on, mask_r, cols, 1, mask_c)


@triton.jit
def _indexed_linear_bwd_db_kernel(
    gy_ptr, rows_ptr, out_ptr,
    M, R, chunk,
    stride_gm, stride_gr, stride_os,
    HAS_ROWS: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
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

    rows = gather_index(rows_ptr, offs_r, mask_r, HAS_ROWS)
    total = tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + piece * stride_os + rows, total, mask=mask_r)


@triton.jit
def _indexed_linear_bwd_reduce_kernel(
    part_ptr, rows_ptr, cols_ptr, out_ptr,
    S, R, C, stride_on,
    HAS_ROWS: tl.constexpr, HAS_COLS: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Adds the ``S`` slices ``[S, R, C]`` in their order, into the kept rows and columns."""
    R = with_alignment(R, ALIGN)
    C = with_alignment(C, ALIGN)
    stride_on = with_alignment(stride_on, ALIGN)
    offs_r = offsets(tl.program_id(0), BLOCK_R)
    offs_c = offsets(tl.program_id(1), BLOCK_C)
    mask_r = offs_r < R
    mask_c = offs_c < C

    acc = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for piece in range(S):
        base = part_ptr + tl.cast(piece, tl.int64) * R * C
        acc += load_tile(base, offs_r, C, mask_r, offs_c, 1, mask_c)

    rows = gather_index(rows_ptr, offs_r, mask_r, HAS_ROWS)
    cols = gather_index(cols_ptr, offs_c, mask_c, HAS_COLS)
    store_tile(out_ptr, acc, rows, stride_on, mask_r, cols, 1, mask_c)


# From the largest output tile to the smallest; at most 96 KiB of shared memory each, so that every
# GPU since Ampere, small ones included, can launch them.
_HALF_TILES = (
    Tile(128, 128, 64, warps=8, stages=3),
    Tile(128, 64, 64, warps=4, stages=3),
    Tile(64, 64, 32, warps=4, stages=3),
    Tile(16, 64, 32, warps=4, stages=3),
)
# Gathered columns and odd widths are loaded element by element, each with its own address: tiles
# must be smaller to stay in registers.
_NARROW_TILES = (
    Tile(128, 64, 32, warps=8, stages=3),
    Tile(64, 64, 32, warps=8, stages=3),
    Tile(16, 64, 32, warps=4, stages=3),
)
# Full-precision float32 has no matrix unit on NVIDIA GPUs; one thread holds a slice of operands.
_FLOAT_TILES = (
    Tile(64, 64, 16, warps=4, stages=3),
    Tile(32, 64, 16, warps=4, stages=3),
    Tile(16, 64, 16, warps=4, stages=3),
)
_SUM_TILE = Tile(32, 64, 1, warps=4, stages=2)  # of the bias gradient and of the slices' sum
_GROUP = 8  # rows of tiles per group of the swizzle


def _tiles(like: Tensor, align: int, gathers_columns: bool) -> tuple[Tile, ...]:
    """The configurations for operands of a dtype, an alignment and a way of loading.

    Raises:
        TypeError: a dtype these kernels do not compute in.
    """
    check_dtype("x", like)
    if like.dtype == torch.float32:
        return _FLOAT_TILES
    return _NARROW_TILES if gathers_columns or align < 4 else _HALF_TILES


def indexed_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, cols: Tensor | None
) -> Tensor:
    """y = x @ W[rows][:, cols]ᵀ + b[rows]: x [M, C] -> y [M, R], any strides.

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    rows, cols = contiguous(rows), contiguous(cols)
    M, C = x.shape
    R = weight.shape[0] if rows is None else rows.shape[0]
    y = torch.empty((M, R), dtype=x.dtype, device=x.device)
    align = alignment(R, C, x.stride(0), weight.stride(0), y.stride(0))
    tile = choose_tile(_tiles(x, align, cols is not None), bucket(M), R)
    if y.numel() == 0:
        return y
    with torch.cuda.device_of(x):
        _indexed_linear_fwd_kernel[(triton.cdiv(M, tile.a) * triton.cdiv(R, tile.b),)](
            x, weight, bias, rows, cols, y,
            M, R, C,
            *x.stride(), *weight.stride(), 1 if bias is None else bias.stride(0), y.stride(0),
            HAS_ROWS=rows is not None, HAS_COLS=cols is not None, HAS_BIAS=bias is not None,
            ALIGN=align, PRECISION=precision(x.dtype),
            BLOCK_M=tile.a, BLOCK_R=tile.b, BLOCK_C=tile.k, GROUP=_GROUP,
            **launch_options(tile),
        )  # fmt: skip
    return y


def indexed_linear_dx(
    grad_y: Tensor, weight: Tensor, rows: Tensor | None, cols: Tensor | None
) -> Tensor:
    """dx = dy @ W[rows][:, cols]: dy [M, R] -> dx [M, C], any strides.

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    rows, cols = contiguous(rows), contiguous(cols)
    M, R = grad_y.shape
    C = weight.shape[1] if cols is None else cols.shape[0]
    grad_x = torch.empty((M, C), dtype=grad_y.dtype, device=grad_y.device)
    align = alignment(R, C, grad_y.stride(0), weight.stride(0), grad_x.stride(0))
    tile = choose_tile(_tiles(grad_y, align, cols is not None), bucket(M), C)
    if grad_x.numel() == 0:
        return grad_x
    with torch.cuda.device_of(grad_y):
        _indexed_linear_bwd_dx_kernel[(triton.cdiv(M, tile.a) * triton.cdiv(C, tile.b),)](
            grad_y, weight, rows, cols, grad_x,
            M, R, C,
            *grad_y.stride(), *weight.stride(), grad_x.stride(0),
            HAS_ROWS=rows is not None, HAS_COLS=cols is not None,
            ALIGN=align, PRECISION=precision(grad_y.dtype),
            BLOCK_M=tile.a, BLOCK_C=tile.b, BLOCK_R=tile.k, GROUP=_GROUP,
            **launch_options(tile),
        )  # fmt: skip
    return grad_x


def _reduce(part: Tensor, rows: Tensor | None, cols: Tensor | None, out: Tensor) -> None:
    """Adds the slices part [S, R, C], in their order, into rows and columns of out [N, K]."""
    S, R, C = part.shape
    block_c = min(_SUM_TILE.b, bucket(C))
    _indexed_linear_bwd_reduce_kernel[(triton.cdiv(R, _SUM_TILE.a), triton.cdiv(C, block_c))](
        part, rows, cols, out,
        S, R, C, out.stride(0),
        HAS_ROWS=rows is not None, HAS_COLS=cols is not None,
        ALIGN=alignment(R, C, out.stride(0)), BLOCK_R=_SUM_TILE.a, BLOCK_C=block_c,
        **launch_options(_SUM_TILE),
    )  # fmt: skip


def indexed_linear_dw(
    grad_y: Tensor, x: Tensor, rows: Tensor | None, cols: Tensor | None, N: int, K: int
) -> Tensor:
    """dW[rows[r], cols[c]] = (dyᵀ x)[r, c], zero elsewhere: dy [M, R], x [M, C] -> [N, K].

    Where the kept part has few tiles, the tokens are cut into slices that are summed afterwards.

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    rows, cols = contiguous(rows), contiguous(cols)
    (M, R), C = grad_y.shape, x.shape[1]
    grad_w = zeros_unless(rows is None and cols is None, (N, K), x)
    align = alignment(R, C, grad_y.stride(0), x.stride(0), K)
    tiles = _tiles(x, align, gathers_columns=False)
    if tiles is _NARROW_TILES:
        tiles = tiles[1:]  # both operands are narrow here: the largest tile would spill
    if R == 0 or C == 0:
        return grad_w
    tile = choose_tile(tiles, R, C, slices=splits(1, triton.cdiv(bucket(M), tiles[0].k)))
    programs, steps = triton.cdiv(R, tile.a) * triton.cdiv(C, tile.b), triton.cdiv(M, tile.k)
    S = splits(programs, steps)
    sliced = S > 1
    shape = (S, R, C)
    part = torch.empty(shape, dtype=torch.float32, device=x.device) if sliced else grad_w[None]
    with torch.cuda.device_of(x):
        _indexed_linear_bwd_dw_kernel[(programs, S)](
            grad_y, x, rows, cols, part,
            M, R, C, triton.cdiv(steps, S) * tile.k,
            *grad_y.stride(), *x.stride(), *part.stride()[:2],
            HAS_ROWS=rows is not None and not sliced, HAS_COLS=cols is not None and not sliced,
            ALIGN=align, PRECISION=precision(x.dtype),
            BLOCK_R=tile.a, BLOCK_C=tile.b, BLOCK_M=tile.k, GROUP=_GROUP,
            **launch_options(tile),
        )  # fmt: skip
        if sliced:
            _reduce(part, rows, cols, grad_w)
    return grad_w


def indexed_linear_db(grad_y: Tensor, rows: Tensor | None, N: int) -> Tensor:
    """db[rows] = sum of dy over tokens, zero elsewhere: dy [M, R] -> [N].

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    rows = contiguous(rows)
    M, R = grad_y.shape
    grad_b = zeros_unless(rows is None, (N,), grad_y)
    align = alignment(R, grad_y.stride(0))
    _tiles(grad_y, align, gathers_columns=False)
    if R == 0:
        return grad_b
    programs, steps = triton.cdiv(R, _SUM_TILE.b), triton.cdiv(M, _SUM_TILE.a)
    S = splits(programs, steps)
    sliced = S > 1
    device = grad_y.device
    part = torch.empty((S, R), dtype=torch.float32, device=device) if sliced else grad_b[None]
    with torch.cuda.device_of(grad_y):
        _indexed_linear_bwd_db_kernel[(programs, S)](
            grad_y, rows, part,
            M, R, triton.cdiv(steps, S) * _SUM_TILE.a,
            *grad_y.stride(), part.stride(0),
            HAS_ROWS=rows is not None and not sliced, ALIGN=align,
            BLOCK_M=_SUM_TILE.a, BLOCK_R=_SUM_TILE.b,
            **launch_options(_SUM_TILE),
        )  # fmt: skip
        if sliced:
            _reduce(part[:, :, None], rows, None, grad_b[:, None])
    return grad_b
