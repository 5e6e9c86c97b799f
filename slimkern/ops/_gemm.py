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

from slimkern.ops._gemm_configs import (
    DESCRIPTOR_TILES,
    GROUP,
    MULTIPLE,
    describable,
    descriptor,
    has_descriptors,
    tiles_for,
)
from slimkern.ops._gemm_descriptors import _gated_descriptor_kernel, _product_descriptor_kernel
from slimkern.ops._gemm_grouped import grouped_products
from slimkern.ops._gemm_kernels import _gated_kernel, _product_kernel
from slimkern.ops._gemm_weights import gathered, padded, product_dw, scatter_sum
from slimkern.ops._launch import launch
from slimkern.ops._tile import (
    alignment,
    bucket,
    check_dtype,
    choose_tile,
    contiguous,
    launch_options,
    precision,
    processors,
)

__all__ = [
    "empty_padded",
    "gated_product",
    "gathered",
    "grouped_products",
    "padded",
    "product",
    "product_dw",
    "product_dx",
    "scatter_sum",
]


def empty_padded(M: int, N: int, like: Tensor, multiple: int = MULTIPLE) -> Tensor:
    """Uninitialised [M, N] like ``like``, its rows ``N`` rounded up to ``multiple`` apart."""
    return torch.empty((M, padded(N, multiple)), dtype=like.dtype, device=like.device)[:, :N]


def _unit(tensor: Tensor) -> Tensor:
    """The same values with neighbours in a row side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@overload
def product(
    x: Tensor, w: Tensor, bias: Tensor | None = None, rows: Tensor | None = None, *,
    activation: str = "none", keep_input: Literal[False] = False,
    residual: Tensor | None = None, out: Tensor | None = None,
    input_precision: str | None = None,
) -> Tensor: ...  # fmt: skip


@overload
def product(
    x: Tensor, w: Tensor, bias: Tensor | None = None, rows: Tensor | None = None, *,
    activation: str = "none", keep_input: Literal[True],
    residual: Tensor | None = None, out: Tensor | None = None,
    input_precision: str | None = None,
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
    check_dtype("x", x)
    rows, bias = contiguous(rows), contiguous(bias)
    residual = None if residual is None else _unit(residual)
    M = x.shape[0]
    R = w.shape[0] if rows is None else rows.shape[0]
    y = torch.empty((M, R), dtype=x.dtype, device=x.device) if out is None else out
    h = empty_padded(M, R, x, max(y.stride(0), 1)) if keep_input else None
    exactness = input_precision or precision(x.dtype)
    _launch(x, w, False, bias, rows, residual, h, y, activation, exactness)
    return y if h is None else (y, h)


def product_dx(
    gy: Tensor, w: Tensor, rows: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """``gy @ W[rows]``: gy [M, R] -> [M, K], any strides; ``out`` as in `product`.

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    check_dtype("x", gy)
    M, K = gy.shape[0], w.shape[1]
    if rows is not None:
        w = gathered(w, rows, None)
    y = torch.empty((M, K), dtype=gy.dtype, device=gy.device) if out is None else out
    _launch(gy, w[: gy.shape[1], :K], True, None, None, None, None, y, "none", precision(gy.dtype))
    return y


def _launch(
    x: Tensor,
    w: Tensor,
    transposed: bool,
    bias: Tensor | None,
    rows: Tensor | None,
    residual: Tensor | None,
    h: Tensor | None,
    y: Tensor,
    activation: str,
    exactness: str,
    packed: bool = False,
) -> None:
    """One product for y [M, N] from w [N, K], or [K, N] where ``transposed``.

    ``packed`` says that the rows of w are kept ones already, and ``rows`` are the bias's alone.
    """
    (M, N), K = y.shape, x.shape[1]
    if y.numel() == 0:
        return
    if has_descriptors(x) and K > 0:
        kept = w if rows is None or packed else gathered(w, rows, None)[:N, :K]
        given = [tensor for tensor in (x, kept, h, residual) if tensor is not None]
        if all(describable(tensor) for tensor in given):
            _launch_descriptors(
                x, kept, transposed, bias, rows, residual, h, y, activation, exactness
            )
            return
    stride_wn, stride_wk = w.stride()[::-1] if transposed else w.stride()
    outputs_adjoin = stride_wn == 1 and stride_wk > 1
    row_of_w = stride_wk if outputs_adjoin else stride_wn
    align = alignment(N, x.stride(0), row_of_w, y.stride(0))
    tile = choose_tile(tiles_for(x, align), bucket(M), N)
    launch(_product_kernel, (triton.cdiv(M, tile.a) * triton.cdiv(N, tile.b),), x)(
        x, w, bias, rows, residual, h, y,
        M, N, K,
        *x.stride(), stride_wn, stride_wk,
        0 if residual is None else residual.stride(0), 0 if h is None else h.stride(0),
        y.stride(0),
        TRANSPOSED=outputs_adjoin, HAS_ROWS=rows is not None, PACKED=packed,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, KEEPS=h is not None,
        ACTIVATION=activation, ALIGN=align, TAIL=K % tile.k != 0, PRECISION=exactness,
        BLOCK_M=tile.a, BLOCK_N=tile.b, BLOCK_K=tile.k, GROUP=GROUP,
        **launch_options(tile),
    )  # fmt: skip


def _launch_descriptors(
    x: Tensor,
    w: Tensor,
    transposed: bool,
    bias: Tensor | None,
    rows: Tensor | None,
    residual: Tensor | None,
    h: Tensor | None,
    y: Tensor,
    activation: str,
    exactness: str,
) -> None:
    """`_launch` by tensor descriptors; ``rows`` are the bias's alone."""
    (M, N), K = y.shape, x.shape[1]
    stores = describable(y)
    # The largest tile has no registers left for addresses of what it stores.
    tile = choose_tile(DESCRIPTOR_TILES[0 if stores else 1 :], bucket(M), N)
    split = tile.b > 128
    width = tile.b // 2 if split else tile.b
    programs = min(triton.cdiv(M, tile.a) * triton.cdiv(N, tile.b), processors(x))
    launch(_product_descriptor_kernel, (programs,), x)(
        descriptor(x, tile.a, tile.k),
        descriptor(w, *((tile.k, tile.b) if transposed else (tile.b, tile.k))),
        descriptor(y if stores else None, tile.a, width),
        descriptor(h, tile.a, width), descriptor(residual, tile.a, width),
        bias, rows, None if stores else y,
        M, N, K, y.stride(0),
        TRANSPOSED=transposed, HAS_ROWS=rows is not None, HAS_BIAS=bias is not None,
        ACTIVATION=activation, PRECISION=exactness, SPLIT=split,
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
    check_dtype("x", x)
    if (gate_bias is None) != (up_bias is None):
        raise ValueError("gate_bias and up_bias: accepted: both, or neither")
    gate_bias, up_bias = contiguous(gate_bias), contiguous(up_bias)
    (M, K), N = x.shape, gate.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device) if out is None else out
    if y.numel() == 0:
        return y
    flags = {
        "HAS_BIAS": gate_bias is not None,
        "ACTIVATION": activation,
        "PRECISION": input_precision or precision(x.dtype),
        "GROUP": GROUP,
    }
    if has_descriptors(x) and all(map(describable, (x, gate, up))):
        tile = choose_tile(DESCRIPTOR_TILES[1:], bucket(M), N)
        stores = describable(y)
        programs = min(triton.cdiv(M, tile.a) * triton.cdiv(N, tile.b), processors(x))
        launch(_gated_descriptor_kernel, (programs,), x)(
            descriptor(x, tile.a, tile.k),
            descriptor(gate, tile.b, tile.k), descriptor(up, tile.b, tile.k),
            descriptor(y if stores else None, tile.a, tile.b),
            gate_bias, up_bias, None if stores else y,
            M, N, K, y.stride(0),
            BLOCK_M=tile.a, BLOCK_N=tile.b, BLOCK_K=tile.k, **flags,
            **launch_options(tile),
        )  # fmt: skip
        return y
    align = alignment(N, x.stride(0), gate.stride(0), up.stride(0), y.stride(0))
    tile = choose_tile(tiles_for(x, align)[1:], bucket(M), N)  # the largest would spill
    launch(_gated_kernel, (triton.cdiv(M, tile.a) * triton.cdiv(N, tile.b),), x)(
        x, gate, up, gate_bias, up_bias, y,
        M, N, K,
        *x.stride(), *gate.stride(), *up.stride(), y.stride(0),
        ALIGN=align, TAIL=K % tile.k != 0,
        BLOCK_M=tile.a, BLOCK_N=tile.b, BLOCK_K=tile.k, **flags,
        **launch_options(tile),
    )  # fmt: skip
    return y
