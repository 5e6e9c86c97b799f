"""Norms of rows on GPUs, with what surrounds them in a block: rows are masked, and also narrowed.

    y = norm(x), zeros behind the last key that the sequence's mask keeps

A program has whole rows in registers: one read, one or two writes. It is no epilogue of the product
before it: a tile of whole rows leaves half of a large GPU without work at 4096 rows (64 tiles of 64
rows for 132 multiprocessors), reads all of the weight in every program, and rounds 384 columns up
to 512, which by count is more than a pass over rows that are still in the L2 cache.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code has no Python types: its arguments are pointers, tensors or constants by turns.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkern.ops._launch import launch
from slimkern.ops._tile import bucket, offsets

# What a mask may be: none, how many keys of each sequence are kept, which, what is added to scores.
_NONE, _LENGTHS, _KEEP, _ADDED = range(4)
_REMOVED = -1e30  # added to a score, removes a key
_ELEMENTS = 2048  # of rows in one program


def removed(dtype: torch.dtype) -> float:
    """What removes a key where it is added to its scores: -1e30, or the least number of float16."""
    return max(_REMOVED, torch.finfo(dtype).min)


@triton.jit
def _kept(mask, THRESHOLD: tl.constexpr, MASK: tl.constexpr):
    """1 where a key counts."""
    if MASK == 3:
        return (mask.to(tl.float32) > THRESHOLD).to(tl.int32)
    return (mask != 0).to(tl.int32)


@triton.jit
def _rows_that_count(
    mask_ptr, rows, mask_m, T, stride_b, stride_t,
    THRESHOLD: tl.constexpr, MASK: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """1 for each row at or before the last key that its sequence keeps."""
    b, t = rows // T, rows % T
    if MASK == 1:
        length = tl.load(mask_ptr + b * stride_b, mask=mask_m, other=0)
        counts = (t < length).to(tl.int32)
    else:
        own = tl.load(mask_ptr + b * stride_b + t * stride_t, mask=mask_m, other=0)
        counts = _kept(own, THRESHOLD, MASK)
        # Most rows are kept themselves: only where one is not, those behind it are looked at.
        if tl.min(tl.where(mask_m, counts, 1), 0) == 0:
            keys = tl.arange(0, BLOCK_T).to(tl.int64)
            inside = mask_m[:, None] & (keys >= 0)[None, :] & (keys < T)[None, :]
            places = mask_ptr + (b * stride_b)[:, None] + (keys * stride_t)[None, :]
            kept = _kept(tl.load(places, mask=inside, other=0), THRESHOLD, MASK)
            behind = inside & (keys[None, :] >= t[:, None])
            counts = tl.max(tl.where(behind, kept, 0), 1)
    return counts


@triton.jit(do_not_specialize=["M", "T"])
def _row_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, mask_ptr, y_ptr, low_ptr,
    M, H, T,
    stride_xm, stride_ym, stride_lm, stride_b, stride_t,
    EPS: tl.constexpr, THRESHOLD: tl.constexpr, KIND: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    MASK: tl.constexpr, HAS_Y: tl.constexpr, HAS_LOW: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """``BLOCK_M`` rows of the norm ``KIND`` (``none``: x itself), stored wide, narrow, or both."""
    rows = offsets(tl.program_id(0), BLOCK_M)
    columns = tl.arange(0, BLOCK_H).to(tl.int64)
    mask_m, mask_h = rows < M, columns < H
    inside = mask_m[:, None] & mask_h[None, :]
    x = tl.load(x_ptr + (rows * stride_xm)[:, None] + columns[None, :], mask=inside, other=0.0)
    y = x.to(tl.float32)
    if KIND == "layer":
        y = tl.where(inside, y - (tl.sum(y, 1) / H)[:, None], 0.0)
    if KIND != "none":
        y = y * tl.rsqrt(tl.sum(y * y, 1) / H + EPS)[:, None]
    if HAS_WEIGHT:
        y = y * tl.load(weight_ptr + columns, mask=mask_h, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + columns, mask=mask_h, other=0.0).to(tl.float32)[None, :]
    if MASK:
        counts = _rows_that_count(
            mask_ptr, rows, mask_m, T, stride_b, stride_t, THRESHOLD, MASK, BLOCK_T
        )
        y = tl.where((counts != 0)[:, None], y, 0.0)
    if HAS_Y:
        place = y_ptr + (rows * stride_ym)[:, None] + columns[None, :]
        tl.store(place, y.to(y_ptr.dtype.element_ty), mask=inside)
    if HAS_LOW:
        place = low_ptr + (rows * stride_lm)[:, None] + columns[None, :]
        tl.store(place, y.to(low_ptr.dtype.element_ty), mask=inside)


def _mask_of(mask: Tensor | None) -> tuple[int, float, tuple[int, int]]:
    """What a mask is, what removes a key in it, and its strides."""
    if mask is None:
        return _NONE, 0.0, (0, 0)
    if mask.dtype == torch.int64:
        return _LENGTHS, 0.0, (mask.stride(0), 0)
    kind = _KEEP if mask.dtype == torch.bool else _ADDED
    least = removed(mask.dtype) if kind == _ADDED else 0.0
    return kind, least, (mask.stride(0), mask.stride(1))


def row_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
    kind: str = "none",
    *,
    mask: Tensor | None = None,
    tokens: int = 1,
    y: Tensor | None = None,
    low: Tensor | None = None,
) -> None:
    """norm(x) of x [M, H], unit last stride, into ``y`` and, rounded, into ``low``.

    Args:
        x: any floating dtype; sums are in float32.
        weight, bias: [H], or None for one and zero.
        eps: added to the variance.
        kind: ``layer``, ``rms`` or ``none``.
        mask: int64 [B], bool or floating [B, tokens] of M = B * tokens rows, or None: rows behind
            the last key that it keeps are zeros.
        y, low: where results go, [M, H] of unit last stride; at least one.
    """
    M, H = x.shape
    if M == 0 or H == 0:
        return
    code, least, strides = _mask_of(mask)
    block_h = bucket(H)
    block_m = max(min(_ELEMENTS // block_h, 8), 1)
    launch(_row_norm_kernel, (triton.cdiv(M, block_m),), x)(
        x, weight, bias, mask, y, low,
        M, H, tokens,
        x.stride(0), 0 if y is None else y.stride(0), 0 if low is None else low.stride(0),
        *strides,
        EPS=eps, THRESHOLD=least, KIND=kind,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
        MASK=code, HAS_Y=y is not None, HAS_LOW=low is not None,
        BLOCK_M=block_m, BLOCK_H=block_h, BLOCK_T=bucket(tokens) if code > 1 else 1,
        num_warps=4 if block_h <= 4096 else 8,
    )  # fmt: skip
