"""Matrix products on GPUs: what the ops' ``triton.py`` are made of.

A weight is ``[N, K]`` and lies as `torch.nn.Linear` keeps it; ``M`` is the number of tokens. Sums
are taken in float32 (in tf32 products where torch's own settings allow it) and rounded once. Rows
of operands and results may be any distance apart: results that a caller keeps to itself are best
made by `empty_padded`, whose rows start on 128-byte boundaries at any width.

Kernels are module attributes, looked up at each launch; nothing here waits for the device or
depends on the values of an index, so every function can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
import triton
from torch import Tensor

from slimkern.ops._gemm_kernels import (
    _gated_kernel,
    _gather_kernel,
    _product_dw_kernel,
    _product_kernel,
    _scatter_sum_kernel,
)
from slimkern.ops._tile import (
    Tile,
    alignment,
    bucket,
    check_dtype,
    choose_tile,
    contiguous,
    launch_options,
    on_device,
    precision,
    splits,
)

# From the largest output tile to the smallest; at most 96 KiB of shared memory each, so that every
# GPU since Ampere, small ones included, can launch them.
HALF_TILES = (
    Tile(128, 128, 64, warps=8, stages=3),
    Tile(128, 64, 64, warps=4, stages=3),
    Tile(64, 64, 64, warps=4, stages=4),
    Tile(32, 64, 64, warps=4, stages=4),
    Tile(16, 64, 64, warps=4, stages=4),
)
# Rows that do not start on 16-byte boundaries are loaded in small pieces, each with an address of
# its own: tiles must be smaller to stay in registers.
NARROW_TILES = (
    Tile(128, 64, 32, warps=8, stages=3),
    Tile(64, 64, 32, warps=8, stages=3),
    Tile(16, 64, 32, warps=4, stages=3),
)
# Full-precision float32 has no matrix unit on NVIDIA GPUs; one thread holds a slice of operands.
FLOAT_TILES = (
    Tile(64, 64, 16, warps=4, stages=3),
    Tile(32, 64, 16, warps=4, stages=3),
    Tile(16, 64, 16, warps=4, stages=3),
)
COPY_TILE = Tile(16, 128, 1, warps=4, stages=2)  # of the compact copy and of the slices' sum
GROUP = 8  # rows of tiles per group of the swizzle
MULTIPLE = 64  # elements: what compact copies and padded rows are rounded up to


def tiles_for(like: Tensor, align: int) -> tuple[Tile, ...]:
    """The configurations for operands of a dtype and an alignment of their strides.

    Raises:
        TypeError: a dtype these kernels do not compute in.
    """
    check_dtype("x", like)
    if like.dtype == torch.float32:
        return FLOAT_TILES
    return NARROW_TILES if align < 4 else HALF_TILES


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def empty_padded(M: int, N: int, like: Tensor, multiple: int = MULTIPLE) -> Tensor:
    """Uninitialised [M, N] like ``like``, its rows ``N`` rounded up to ``multiple`` apart."""
    return torch.empty((M, _padded(N, multiple)), dtype=like.dtype, device=like.device)[:, :N]


def _unit(tensor: Tensor) -> Tensor:
    """The same values with neighbours in a row side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def gathered(
    w: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    *,
    multiple: int = MULTIPLE,
    transposed: bool = False,
) -> Tensor:
    """The compact copy of ``W[rows][:, cols]``: one launch.

    Args:
        w: [N, K], any strides.
        rows, cols: int64, sorted, unique, or None for all.
        multiple: both sizes are rounded up to it; what is added is zero.
        transposed: [C', R'] instead of [R', C'].
    """
    check_dtype("w", w)
    rows, cols = contiguous(rows), contiguous(cols)
    R = w.shape[0] if rows is None else rows.shape[0]
    C = w.shape[1] if cols is None else cols.shape[0]
    shape = (_padded(R, multiple), _padded(C, multiple))
    out = torch.empty(shape[::-1] if transposed else shape, dtype=w.dtype, device=w.device)
    if out.numel() == 0:
        return out
    tile = COPY_TILE
    grid = (triton.cdiv(shape[0], tile.a), triton.cdiv(shape[1], tile.b))
    with on_device(w):
        _gather_kernel[grid](
            w, rows, cols, out,
            R, C, *shape, *w.stride(), *(out.stride()[::-1] if transposed else out.stride()),
            HAS_ROWS=rows is not None, HAS_COLS=cols is not None,
            BLOCK_R=tile.a, BLOCK_C=tile.b,
            **launch_options(tile),
        )  # fmt: skip
    return out


@overload
def product(
    x: Tensor, w: Tensor, bias: Tensor | None = None, rows: Tensor | None = None, *,
    activation: str = "none", keep_input: Literal[False] = False,
    residual: Tensor | None = None, out: Tensor | None = None, input_precision: str | None = None,
) -> Tensor: ...  # fmt: skip


@overload
def product(
    x: Tensor, w: Tensor, bias: Tensor | None = None, rows: Tensor | None = None, *,
    activation: str = "none", keep_input: Literal[True],
    residual: Tensor | None = None, out: Tensor | None = None, input_precision: str | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def product(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    *,
    activation: str = "none",
    keep_input: bool = False,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    input_precision: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``y = a(h) + residual`` with ``h = x @ W[rows]^T + b[rows]``; ``(y, h)`` on ``keep_input``.

    Args:
        x: [M, K], any strides.
        w: [N, K], any strides.
        bias: [N], or None.
        rows: int64 [R], sorted, unique, or None for all N.
        activation: one of `slimkern.ops.activation.api.ACTIVATIONS`.
        keep_input: also return ``h``, in the dtype of x, its rows as far apart as those of ``y``.
        residual: [M, R], added in float32 before the one rounding; or None.
        out: [M, R] to write to, of any floating dtype, neighbours in a row side by side; or None.
        input_precision: of float32 products, ``ieee`` or ``tf32``; None: what torch's settings ask.

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    rows, bias = contiguous(rows), contiguous(bias)
    residual = None if residual is None else _unit(residual)
    M = x.shape[0]
    R = w.shape[0] if rows is None else rows.shape[0]
    y = torch.empty((M, R), dtype=x.dtype, device=x.device) if out is None else out
    h = empty_padded(M, R, x, max(y.stride(0), 1)) if keep_input else None
    _launch_product(
        x, w, w.stride(0), w.stride(1), bias, rows, residual, h, y, activation, input_precision
    )
    return y if h is None else (y, h)


def product_dx(
    gy: Tensor, w: Tensor, rows: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """``gy @ W[rows]``: gy [M, R] -> [M, K], any strides; ``out`` as in `product`.

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    M, K = gy.shape[0], w.shape[1]
    if rows is not None:
        w = gathered(w, rows, None)
    y = torch.empty((M, K), dtype=gy.dtype, device=gy.device) if out is None else out
    _launch_product(gy, w, w.stride(1), w.stride(0), None, None, None, None, y, "none")
    return y


def _launch_product(
    x: Tensor,
    w: Tensor,
    stride_wn: int,
    stride_wk: int,
    bias: Tensor | None,
    rows: Tensor | None,
    residual: Tensor | None,
    h: Tensor | None,
    y: Tensor,
    activation: str,
    input_precision: str | None = None,
) -> None:
    """One launch for y [M, N]; the weight's strides say which of its sides is summed over."""
    (M, N), K = y.shape, x.shape[1]
    align = alignment(N, x.stride(0), w.stride(0), y.stride(0))
    tile = choose_tile(tiles_for(x, align), bucket(M), N)
    if y.numel() == 0:
        return
    with on_device(x):
        _product_kernel[(triton.cdiv(M, tile.a) * triton.cdiv(N, tile.b),)](
            x, w, bias, rows, residual, h, y,
            M, N, K,
            *x.stride(), stride_wn, stride_wk,
            0 if residual is None else residual.stride(0), 0 if h is None else h.stride(0),
            y.stride(0),
            HAS_ROWS=rows is not None, HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None, KEEPS=h is not None, ACTIVATION=activation,
            ALIGN=align, TAIL=K % tile.k != 0, PRECISION=input_precision or precision(x.dtype),
            BLOCK_M=tile.a, BLOCK_N=tile.b, BLOCK_K=tile.k, GROUP=GROUP,
            **launch_options(tile),
        )  # fmt: skip


def gated_product(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    *,
    activation: str,
    out: Tensor | None = None,
    input_precision: str | None = None,
) -> Tensor:
    """``a(x @ Wg^T + bg) * (x @ Wu^T + bu)``, x read once: x [M, K], gate and up [N, K] -> [M, N].

    Both biases, or neither. ``out`` and ``input_precision`` as in `product`.

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
        ValueError: one bias without the other.
    """
    if (gate_bias is None) != (up_bias is None):
        raise ValueError("gate_bias and up_bias: accepted: both, or neither")
    gate_bias, up_bias = contiguous(gate_bias), contiguous(up_bias)
    (M, K), N = x.shape, gate.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device) if out is None else out
    align = alignment(N, x.stride(0), gate.stride(0), up.stride(0), y.stride(0))
    tiles = tiles_for(x, align)
    tile = choose_tile(tiles[1:], bucket(M), N)  # two accumulators: the largest would spill
    if y.numel() == 0:
        return y
    with on_device(x):
        _gated_kernel[(triton.cdiv(M, tile.a) * triton.cdiv(N, tile.b),)](
            x, gate, up, gate_bias, up_bias, y,
            M, N, K,
            *x.stride(), *gate.stride(), *up.stride(), y.stride(0),
            HAS_BIAS=gate_bias is not None, ACTIVATION=activation,
            ALIGN=align, TAIL=K % tile.k != 0, PRECISION=input_precision or precision(x.dtype),
            BLOCK_M=tile.a, BLOCK_N=tile.b, BLOCK_K=tile.k, GROUP=GROUP,
            **launch_options(tile),
        )  # fmt: skip
    return y


def product_dw(
    gy: Tensor,
    x: Tensor,
    *,
    out: Tensor | None = None,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
    shape: tuple[int, int] | None = None,
) -> Tensor:
    """``dW[rows[r], cols[c]] = (gy^T x)[r, c]``, zero elsewhere: gy [M, R], x [M, C] -> [N, K].

    Where the kept part has few tiles, the tokens are cut into slices that are summed afterwards,
    always in the same order.

    Args:
        gy, x: any strides.
        out: [N, K] to write to, neighbours in a row side by side; or None.
        rows, cols: int64, sorted, unique; None where all are kept.
        shape: ``(N, K)``; None for ``out``'s, or ``(R, C)``.

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    rows, cols = contiguous(rows), contiguous(cols)
    (M, R), C = gy.shape, x.shape[1]
    grad = torch.empty(shape or (R, C), dtype=x.dtype, device=x.device) if out is None else out
    align = alignment(R, C, gy.stride(0), x.stride(0))
    tiles = tiles_for(x, align)
    if tiles is NARROW_TILES:
        tiles = tiles[1:]  # both operands are narrow here: the largest tile would spill
    if R == 0 or C == 0:
        return grad.zero_()
    tile = choose_tile(tiles, R, C, slices=splits(1, triton.cdiv(bucket(M), tiles[0].k)))
    programs, steps = triton.cdiv(R, tile.a) * triton.cdiv(C, tile.b), triton.cdiv(M, tile.k)
    S = splits(programs, steps)
    direct = S == 1 and rows is None and cols is None
    kind = torch.float32 if S > 1 else x.dtype
    part = grad[None]
    if not direct:
        part = torch.empty((S, R, _padded(C, 16)), dtype=kind, device=x.device)
    with on_device(x):
        _product_dw_kernel[(programs, S)](
            gy, x, part,
            M, R, C, triton.cdiv(steps, S) * tile.k,
            *gy.stride(), *x.stride(), *part.stride()[:2],
            ALIGN=align, TAIL=M % tile.k != 0, PRECISION=precision(x.dtype),
            BLOCK_R=tile.a, BLOCK_C=tile.b, BLOCK_M=tile.k, GROUP=GROUP,
            **launch_options(tile),
        )  # fmt: skip
    if not direct:
        scatter_sum(part, R, C, rows, cols, grad)
    return grad


def scatter_sum(
    part: Tensor, R: int, C: int, rows: Tensor | None, cols: Tensor | None, out: Tensor
) -> None:
    """Writes all of out [N, K]: the slices part [S, R, >= C], added in their order, and zeros."""
    N, K = out.shape
    block_k = min(COPY_TILE.b, bucket(K))
    with on_device(out):
        _scatter_sum_kernel[(triton.cdiv(N, COPY_TILE.a), triton.cdiv(K, block_k))](
            part, rows, cols, out,
            part.shape[0], R, C, N, K, *part.stride()[:2], out.stride(0),
            HAS_ROWS=rows is not None, HAS_COLS=cols is not None,
            STEPS_R=R.bit_length(), STEPS_C=C.bit_length(),
            BLOCK_N=COPY_TILE.a, BLOCK_K=block_k,
            **launch_options(COPY_TILE),
        )  # fmt: skip


def grouped_products(
    xs: list[Tensor], ws: list[Tensor], biases: list[Tensor | None]
) -> list[Tensor]:
    """``x @ W^T + b`` for each triple, of any widths."""
    return [product(x, w, bias) for x, w, bias in zip(xs, ws, biases, strict=True)]
