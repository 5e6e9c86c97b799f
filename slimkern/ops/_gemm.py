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
from slimkern.ops._gemm_descriptors import _gated_descriptor_kernel
from slimkern.ops._gemm_grouped import grouped_products
from slimkern.ops._gemm_kernels import _gated_kernel
from slimkern.ops._gemm_product import Product, run
from slimkern.ops._gemm_weights import gathered, kept_part, padded, product_dw, run_of, scatter_sum
from slimkern.ops._launch import launch
from slimkern.ops._tile import (
    Tile,
    alignment,
    bucket,
    check_dtype,
    choose_tile,
    contiguous,
    launch_options,
    precision,
    processors,
)
from slimkern.ops._tune import fastest

__all__ = [
    "empty_padded",
    "gated_product",
    "gathered",
    "grouped_products",
    "kept_part",
    "padded",
    "product",
    "product_dw",
    "product_dx",
    "run_of",
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
    input_precision: str | None = None, packed: bool = False,
) -> Tensor: ...  # fmt: skip


@overload
def product(
    x: Tensor, w: Tensor, bias: Tensor | None = None, rows: Tensor | None = None, *,
    activation: str = "none", keep_input: Literal[True],
    residual: Tensor | None = None, out: Tensor | None = None,
    input_precision: str | None = None, packed: bool = False,
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
    packed: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``y = a(h) + residual`` with ``h = x @ W[rows]^T + b[rows]``; ``(y, h)`` on ``keep_input``.

    Args:
        x: [M, K], any strides.
        w: [N, K], any strides; what it has beyond K columns is left out.
        bias: [N], or None.
        rows: int64 [R], sorted, unique, or None for all N.
        activation: one of `slimkern.ops.activation.api.ACTIVATIONS`.
        keep_input: also return ``h``, in the dtype of x, its rows as far apart as those of ``y``.
        residual: [M, R], added in float32 before the one rounding; or None.
        out: [M, R] to write to, of any floating dtype, neighbours in a row side by side; or None.
        input_precision: of float32 products, ``ieee`` or ``tf32``; None: what torch's settings ask.
        packed: w holds the kept rows only, as `gathered` makes them; ``rows`` are the bias's.

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    check_dtype("x", x)
    rows, bias = contiguous(rows), contiguous(bias)
    residual = None if residual is None else _unit(residual)
    M, K = x.shape
    w = w if w.shape[1] == K else w[:, :K]
    R = w.shape[0] if rows is None else rows.shape[0]
    y = torch.empty((M, R), dtype=x.dtype, device=x.device) if out is None else out
    h = empty_padded(M, R, x, max(y.stride(0), 1)) if keep_input else None
    run(
        Product(
            x, w, y, input_precision or precision(x.dtype), bias=bias, rows=rows, packed=packed,
            residual=residual, h=h, activation=activation,
        )
    )  # fmt: skip
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
    run(Product(gy, w[: gy.shape[1], :K], y, precision(gy.dtype), transposed=True))
    return y


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
    M, N = x.shape[0], gate.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device) if out is None else out
    if y.numel() == 0:
        return y
    exactness = input_precision or precision(x.dtype)
    _run_gated(x, gate, up, gate_bias, up_bias, y, activation, exactness)
    return y


def _run_gated(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    y: Tensor,
    activation: str,
    exactness: str,
) -> None:
    """The launch of `gated_product`."""
    (M, K), N = x.shape, gate.shape[0]
    flags = {
        "HAS_BIAS": gate_bias is not None,
        "ACTIVATION": activation,
        "PRECISION": exactness,
        "GROUP": GROUP,
    }
    by_descriptor = K > 0 and has_descriptors(x) and all(map(describable, (x, gate, up)))
    stores = describable(y)
    between_rows = (max(gate.stride()), max(up.stride()))  # a transposed weight's are its second
    align = alignment(N, x.stride(0), *between_rows, y.stride(0))
    # There are two tiles of sums: the largest configurations would spill, and one more of them
    # where each element that is stored has an address of its own.
    first = 2 if by_descriptor and not stores else 1
    tiles = (DESCRIPTOR_TILES if by_descriptor else tiles_for(x, align))[first:]

    def attempt(tile: Tile) -> None:
        programs = triton.cdiv(M, tile.a) * triton.cdiv(N, tile.b)
        blocks = {"BLOCK_M": tile.a, "BLOCK_N": tile.b, "BLOCK_K": tile.k}
        if by_descriptor:
            launch(_gated_descriptor_kernel, (min(programs, processors(x)),), x)(
                descriptor(x, tile.a, tile.k),
                descriptor(gate, tile.b, tile.k), descriptor(up, tile.b, tile.k),
                descriptor(y if stores else None, tile.a, tile.b // 2),
                gate_bias, up_bias, None if stores else y,
                M, N, K, y.stride(0),
                **blocks, **flags, **launch_options(tile),
            )  # fmt: skip
        else:
            launch(_gated_kernel, (programs,), x)(
                x, gate, up, gate_bias, up_bias, y,
                M, N, K,
                *x.stride(), *gate.stride(), *up.stride(), y.stride(0),
                ALIGN=align, TAIL=K % tile.k != 0,
                **blocks, **flags, **launch_options(tile),
            )  # fmt: skip

    tile = choose_tile(tiles, bucket(M), N)
    sizes = (bucket(M), N, K, align, by_descriptor, y.dtype, *flags.values(), stores)
    attempt(fastest("gated product", sizes, x, tiles, tile, attempt, accumulators=2))
