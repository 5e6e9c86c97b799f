"""The equation on a Triton kernel: rows are gathered, added and normalised in registers.

A kernel can't raise: a token whose index is no row of its table gets a row of NaN.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code has no Python types: its arguments are pointers, tensors or constants by turns.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkern.ops._launch import launch
from slimkern.ops._tile import bucket, check_dtype, offsets

_ELEMENTS = 2048  # of rows in one program


@triton.jit
def _gathered(
    table_ptr, ids_ptr, b, t, mask_m, columns, mask_h,
    size, stride_row, stride_b, stride_t, step,
    HAS_IDS: tl.constexpr,
):  # fmt: skip
    """The rows of a table that tokens have, in float32: of ``ids``, or row ``t * step``."""
    rows = t * step
    if HAS_IDS:
        rows = tl.load(ids_ptr + b * stride_b + t * stride_t, mask=mask_m, other=0)
    known = mask_m & (rows >= 0) & (rows < size)
    places = table_ptr + (rows * stride_row)[:, None] + columns[None, :]
    found = tl.load(places, mask=known[:, None] & mask_h[None, :], other=0.0).to(tl.float32)
    return tl.where(known[:, None], found, float("nan"))


@triton.jit(do_not_specialize=["M", "T"])
def _embeddings_kernel(
    ids_ptr, words_ptr, types_ptr, type_ids_ptr, positions_ptr, position_ids_ptr,
    gamma_ptr, beta_ptr, y_ptr,
    M, T, H, words_size, types_size, positions_size,
    words_row, types_row, positions_row,
    ids_b, ids_t, type_ids_b, type_ids_t, position_ids_b, position_ids_t,
    EPS: tl.constexpr,
    HAS_TYPES: tl.constexpr, HAS_TYPE_IDS: tl.constexpr, HAS_POSITION_IDS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """``BLOCK_M`` tokens of ``norm(words[.] + types[.] + positions[.])``."""
    token = offsets(tl.program_id(0), BLOCK_M)
    columns = tl.arange(0, BLOCK_H).to(tl.int64)
    mask_m, mask_h = token < M, columns < H
    b, t = token // T, token % T
    y = _gathered(
        words_ptr, ids_ptr, b, t, mask_m, columns, mask_h, words_size, words_row, ids_b, ids_t, 0,
        True,
    )  # fmt: skip
    if HAS_TYPES:
        y += _gathered(
            types_ptr, type_ids_ptr, b, t, mask_m, columns, mask_h, types_size, types_row,
            type_ids_b, type_ids_t, 0, HAS_TYPE_IDS,
        )  # fmt: skip
    y += _gathered(
        positions_ptr, position_ids_ptr, b, t, mask_m, columns, mask_h, positions_size,
        positions_row, position_ids_b, position_ids_t, 1, HAS_POSITION_IDS,
    )  # fmt: skip
    y = tl.where(
        mask_h[None, :], y - (tl.sum(tl.where(mask_h[None, :], y, 0.0), 1) / H)[:, None], 0.0
    )
    y = y * tl.rsqrt(tl.sum(y * y, 1) / H + EPS)[:, None]
    y = y * tl.load(gamma_ptr + columns, mask=mask_h, other=0.0).to(tl.float32)[None, :]
    y = y + tl.load(beta_ptr + columns, mask=mask_h, other=0.0).to(tl.float32)[None, :]
    inside = mask_m[:, None] & mask_h[None, :]
    places = y_ptr + (token * H)[:, None] + columns[None, :]
    tl.store(places, y.to(y_ptr.dtype.element_ty), mask=inside)


def _steps(ids: Tensor | None, B: int) -> tuple[int, int]:
    """Strides of ``ids`` [B or 1, T] over sequences and tokens."""
    if ids is None:
        return 0, 0
    return (ids.stride(0) if ids.shape[0] == B else 0), ids.stride(1)


def embeddings(
    ids: Tensor,
    words: Tensor,
    types: Tensor | None,
    type_ids: Tensor | None,
    positions: Tensor,
    position_ids: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
) -> Tensor:
    """ids [B, T] -> y [B, T, hidden] in the dtype of the tables."""
    check_dtype("words", words)
    (B, T), H = ids.shape, words.shape[1]
    y = torch.empty((B, T, H), dtype=words.dtype, device=words.device)
    if y.numel() == 0:
        return y
    gamma, beta = gamma.contiguous(), beta.contiguous()
    block_h = bucket(H)
    block_m = max(min(_ELEMENTS // block_h, 8), 1)
    launch(_embeddings_kernel, (triton.cdiv(B * T, block_m),), words)(
        ids, words, types, type_ids, positions, position_ids, gamma, beta, y,
        B * T, T, H,
        words.shape[0], 0 if types is None else types.shape[0], positions.shape[0],
        words.stride(0), 0 if types is None else types.stride(0), positions.stride(0),
        *_steps(ids, B), *_steps(type_ids, B), *_steps(position_ids, B),
        EPS=eps, HAS_TYPES=types is not None, HAS_TYPE_IDS=type_ids is not None,
        HAS_POSITION_IDS=position_ids is not None,
        BLOCK_M=block_m, BLOCK_H=block_h,
        num_warps=4 if block_h <= 4096 else 8,
    )  # fmt: skip
    return y
