"""Copies of the kept parts of weights, and gradients of heads put side by side, on the device."""

# mypy: disable-error-code="no-untyped-def"
# Device code has no Python types: its arguments are pointers, tensors or constants by turns.

from __future__ import annotations

import triton
import triton.language as tl

from slimkern.ops._tile import gather_index, load_tile, offsets, store_tile


@triton.jit
def _kept_part(
    kept, shift, w_ptr, b_ptr, rows_ptr, here, local, stride_n, stride_k, cols, mask_c,
    HAS_ROWS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """``kept`` and ``shift`` with the rows that are this weight's, where ``here``."""
    rows = gather_index(rows_ptr, local, here, HAS_ROWS)
    tile = load_tile(w_ptr, rows, stride_n, here, cols, stride_k, mask_c).to(tl.float32)
    kept = tl.where(here[:, None], tile, kept)
    if HAS_BIAS:
        shift = tl.where(here, tl.load(b_ptr + rows, mask=here, other=0.0).to(tl.float32), shift)
    return kept, shift


@triton.jit
def _kept_weights_kernel(
    w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, r0_ptr, r1_ptr, r2_ptr, cols_ptr,
    out_ptr, shift_ptr,
    R, C, R_OUT, C_OUT,
    stride_n0, stride_k0, stride_n1, stride_k1, stride_n2, stride_k2,
    PARTS: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_COLS: tl.constexpr, BIASES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of the compact copy: ``R`` rows of each of ``PARTS`` weights, zeros after them.

    Bit i of ``BIASES`` says that weight i has a bias; with any, the first column of tiles writes
    the kept biases.
    """
    offs_r = offsets(tl.program_id(0), BLOCK_R)
    offs_c = offsets(tl.program_id(1), BLOCK_C)
    mask_c = offs_c < C
    cols = gather_index(cols_ptr, offs_c, mask_c, HAS_COLS)
    kept = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    shift = tl.zeros((BLOCK_R,), dtype=tl.float32)
    kept, shift = _kept_part(
        kept, shift, w0_ptr, b0_ptr, r0_ptr, offs_r < R, offs_r, stride_n0, stride_k0,
        cols, mask_c, HAS_ROWS, (BIASES & 1) != 0,
    )  # fmt: skip
    if PARTS == 3:
        local = offs_r - R
        kept, shift = _kept_part(
            kept, shift, w1_ptr, b1_ptr, r1_ptr, (local >= 0) & (local < R), local,
            stride_n1, stride_k1, cols, mask_c, HAS_ROWS, (BIASES & 2) != 0,
        )  # fmt: skip
        local = offs_r - 2 * R
        kept, shift = _kept_part(
            kept, shift, w2_ptr, b2_ptr, r2_ptr, (local >= 0) & (local < R), local,
            stride_n2, stride_k2, cols, mask_c, HAS_ROWS, (BIASES & 4) != 0,
        )  # fmt: skip
    mask_r = offs_r < R_OUT
    store_tile(out_ptr, kept, offs_r, C_OUT, mask_r, offs_c, 1, offs_c < C_OUT)
    if BIASES != 0:  # noqa: SIM102  (a constant, and a value of the device)
        if tl.program_id(1) == 0:
            tl.store(shift_ptr + offs_r, shift.to(shift_ptr.dtype.element_ty), mask=mask_r)


@triton.jit
def _of_three(part, first, second, third):
    """One of three pointers or numbers."""
    return tl.where(part == 0, first, tl.where(part == 1, second, third))


@triton.jit
def _joined_heads_kernel(
    g0_ptr, g1_ptr, g2_ptr, out_ptr, part_ptr,
    M, T, HEADS, D, chunk,
    b0, h0, t0, d0, b1, h1, t1, d1, b2, h2, t2, d2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Columns of gradient ``program_id(2)`` and slice ``program_id(1)`` of the tokens.

    They are put beside those of the other two gradients, and their sums are taken.
    """
    part = tl.program_id(2)
    piece = tl.cast(tl.program_id(1), tl.int64)
    width = HEADS * D
    offs_n = offsets(tl.program_id(0), BLOCK_N)
    mask_n = offs_n < width
    head = offs_n // D
    columns = head * _of_three(part, h0, h1, h2) + (offs_n - head * D) * _of_three(part, d0, d1, d2)
    grad_ptr = _of_three(part, g0_ptr, g1_ptr, g2_ptr)
    stride_b, stride_t = _of_three(part, b0, b1, b2), _of_three(part, t0, t1, t2)
    begin = piece * chunk
    end = tl.minimum(begin + chunk, M)
    out_ptr += part * width

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for block in range(tl.cdiv(end - begin, BLOCK_M)):
        offs_m = begin + offsets(block, BLOCK_M)
        mask_m = offs_m < end
        batch = offs_m // T
        rows = batch * stride_b + (offs_m - batch * T) * stride_t
        tile = load_tile(grad_ptr, rows, 1, mask_m, columns, 1, mask_n).to(tl.float32)
        store_tile(out_ptr, tile, offs_m, 3 * width, mask_m, offs_n, 1, mask_n)
        total += tile
    tl.store(part_ptr + (piece * 3 + part) * width + offs_n, tl.sum(total, axis=0), mask=mask_n)
