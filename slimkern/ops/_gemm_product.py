"""From a product to its kernel: which one, with which configuration, and its launch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from slimkern.ops._gemm_configs import (
    DESCRIPTOR_TILES,
    GROUP,
    HALF_TILES,
    describable,
    descriptor,
    has_descriptors,
    tiles_for,
    turns,
)
from slimkern.ops._gemm_descriptors import _product_descriptor_kernel
from slimkern.ops._gemm_kernels import _product_kernel
from slimkern.ops._gemm_weights import gathered
from slimkern.ops._launch import launch
from slimkern.ops._tile import (
    Tile,
    alignment,
    bucket,
    capability,
    choose_tile,
    launch_options,
    processors,
)
from slimkern.ops._tune import fastest

# Where kept rows are gathered while tiles are loaded, nothing measurable is lost on an H100; a copy
# of them takes 6 us (bench/results/h100-2026-11-22-indexed-linear.md). So products of fewer
# operations than these, some 30 us, do without it.
_WORTH_A_COPY = 1 << 34
# Without matrix units, outputs that adjoin in memory are what threads load side by side: on an H100
# a weight as `torch.nn.Linear` keeps it took 3.7 times as long as its transpose.
_MANY = 256  # tokens from which on a transposed copy is made


@dataclass(frozen=True)
class Product:
    """``y = a(h) + residual`` with ``h = x @ W[rows]^T + b[rows]``.

    Args:
        x: [M, K].
        w: [N, K], or [K, N] where ``transposed``.
        y: [M, N], written.
        precision: Triton's name of how exact float32 products are.
        transposed: see w.
        bias: [N] before ``rows``, or None.
        rows: kept rows of the weight and of the bias, or None.
        packed: w holds the kept rows only; ``rows`` are the bias's.
        residual: [M, N], or None.
        h: [M, N], written; or None.
        activation: one of `slimkern.ops.activation.api.ACTIVATIONS`.
    """

    x: Tensor
    w: Tensor
    y: Tensor
    precision: str
    transposed: bool = False
    bias: Tensor | None = None
    rows: Tensor | None = None
    packed: bool = False
    residual: Tensor | None = None
    h: Tensor | None = None
    activation: str = "none"

    def compact(self, *, transposed: bool = False) -> Product:
        """The same with a copy of the kept rows in the place of the weight."""
        N, K = self.y.shape[1], self.x.shape[1]
        rows = None if self.packed else self.rows
        w = gathered(self.w, rows, None, transposed=transposed)
        w = w[:K, :N] if transposed else w[:N, :K]
        return replace(self, w=w, packed=True, transposed=transposed)

    def epilogue(self) -> tuple[object, ...]:
        """What follows the sums: it takes registers and time, so that it tells a problem too."""
        present = (self.bias is not None, self.rows is not None, self.packed, self.h is not None)
        added = None if self.residual is None else self.residual.dtype
        return *present, added, self.y.dtype, self.activation


def run(p: Product) -> None:
    """Computes a product, in one launch or in two: the copy of the kept rows, and the product."""
    if p.y.numel() == 0:
        return
    if not p.transposed and p.w.stride(0) == 1 < p.w.stride(1) and (p.rows is None or p.packed):
        p = replace(p, w=p.w.t(), transposed=True)
    if has_descriptors(p.x) and p.x.shape[1] > 0:
        given = (p.x, p.h, p.residual)
        if all(tensor is None or describable(tensor) for tensor in given):
            (M, N), K = p.y.shape, p.x.shape[1]
            if p.rows is not None and not p.packed and 2 * M * N * K >= _WORTH_A_COPY:
                p = p.compact()
            if (p.rows is None or p.packed) and describable(p.w):
                _by_descriptors(p)
                return
    exact = p.x.dtype == torch.float32 and p.precision == "ieee"
    if exact and not p.transposed and p.w.stride(1) == 1 and p.x.shape[0] >= _MANY:
        p = p.compact(transposed=True)
    _by_pointers(p)


def _by_pointers(p: Product) -> None:
    (M, N), K = p.y.shape, p.x.shape[1]
    stride_wn, stride_wk = p.w.stride()[::-1] if p.transposed else p.w.stride()
    outputs_adjoin = stride_wn == 1 and stride_wk > 1
    row_of_w = stride_wk if outputs_adjoin else stride_wn
    align = alignment(N, p.x.stride(0), row_of_w, p.y.stride(0))

    def attempt(tile: Tile) -> None:
        launch(_product_kernel, (triton.cdiv(M, tile.a) * triton.cdiv(N, tile.b),), p.x)(
            p.x, p.w, p.bias, p.rows, p.residual, p.h, p.y,
            M, N, K,
            *p.x.stride(), stride_wn, stride_wk,
            0 if p.residual is None else p.residual.stride(0),
            0 if p.h is None else p.h.stride(0),
            p.y.stride(0),
            TRANSPOSED=outputs_adjoin, HAS_ROWS=p.rows is not None, PACKED=p.packed,
            HAS_BIAS=p.bias is not None, HAS_RESIDUAL=p.residual is not None,
            KEEPS=p.h is not None, ACTIVATION=p.activation,
            ALIGN=align, TAIL=K % tile.k != 0, PRECISION=p.precision,
            TURN=outputs_adjoin and turns(p.x, tile, p.precision),
            BLOCK_M=tile.a, BLOCK_N=tile.b, BLOCK_K=tile.k, GROUP=GROUP,
            **launch_options(tile),
        )  # fmt: skip

    tiles = tiles_for(p.x, align)
    # Sums that are written twice: the largest tile has no registers for a residual's addresses too,
    # nor for sums that are read back from tensor memory.
    crowded = p.h is not None and (p.residual is not None or capability(p.x) >= 100)
    if crowded and tiles is HALF_TILES:
        tiles = tiles[1:]
    tile = choose_tile(tiles, bucket(M), N)
    sizes = (bucket(M), N, K, align, outputs_adjoin, p.precision, *p.epilogue())
    attempt(fastest("product", sizes, p.x, tiles, tile, attempt))


def _by_descriptors(p: Product) -> None:
    (M, N), K = p.y.shape, p.x.shape[1]
    stores = describable(p.y)
    # Sums that are read back from tensor memory take registers beside those of the epilogue.
    unsplit = 32 if capability(p.x) >= 100 else 128

    def attempt(tile: Tile) -> None:
        split = tile.b > unsplit
        width = tile.b // 2 if split else tile.b
        programs = min(triton.cdiv(M, tile.a) * triton.cdiv(N, tile.b), processors(p.x))
        launch(_product_descriptor_kernel, (programs,), p.x)(
            descriptor(p.x, tile.a, tile.k),
            descriptor(p.w, *((tile.k, tile.b) if p.transposed else (tile.b, tile.k))),
            descriptor(p.y if stores else None, tile.a, width),
            descriptor(p.h, tile.a, width), descriptor(p.residual, tile.a, width),
            p.bias, p.rows, None if stores else p.y,
            M, N, K, p.y.stride(0),
            TRANSPOSED=p.transposed, HAS_ROWS=p.rows is not None, HAS_BIAS=p.bias is not None,
            ACTIVATION=p.activation, PRECISION=p.precision, SPLIT=split,
            BLOCK_M=tile.a, BLOCK_N=tile.b, BLOCK_K=tile.k, GROUP=GROUP,
            **launch_options(tile),
        )  # fmt: skip

    # Registers: the largest tiles have none left for the addresses of what they store, and the
    # widest none for an activation where sums are read back from tensor memory, or where the weight
    # lies across the reduction. Shared memory: a tile of a float32 residual takes as much as two
    # stages of operands.
    narrower = capability(p.x) >= 100 or (p.transposed and p.activation != "none")
    wide = p.residual is not None and p.residual.element_size() > 2
    first = 2 if wide or not stores else 1 if narrower else 0
    tiles = DESCRIPTOR_TILES[first:]
    tile = choose_tile(tiles, bucket(M), N)
    sizes = (bucket(M), N, K, p.transposed, stores, *p.epilogue())
    attempt(fastest("product by descriptors", sizes, p.x, tiles, tile, attempt))
