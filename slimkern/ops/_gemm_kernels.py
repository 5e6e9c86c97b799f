"""Matrix products on the device: pointer kernels that run everywhere Triton does.

``x @ W[rows]^T`` with what follows it in the epilogue, gated pairs of products that read ``x``
once, ``grad_y^T x`` in slices of tokens, and the compact copy of a weight's kept part. Every output
element is one program's sum or a sum of slices in a fixed order: no atomics, so results are the
same from run to run. Launchers are in ``_gemm.py``; kernels on tensor descriptors in
``_gemm_descriptors.py``.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code has no Python types: its arguments are pointers, tensors or constants by turns.

from __future__ import annotations

import triton
import triton.language as tl

from slimkern.ops._activations import activation_value
from slimkern.ops._tile import (
    INTERPRETED,
    dot,
    gather_index,
    load_tile,
    offsets,
    store_tile,
    swizzle,
    with_alignment,
)


@triton.jit
def through_registers(x, NEEDED: tl.constexpr):
    """``x``, rounded to the nearest tf32 in registers where that is needed.

    Since Hopper, matrix units want tf32 operands in shared memory along the reduction. One that
    lies across it would be copied there in pieces of 4 bytes; one that passes through registers is
    loaded 16 bytes at a time as it lies, and turned on its way back.
    """
    if NEEDED and not INTERPRETED:
        x = tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return x


@triton.jit
def multiply(
    acc, a_ptr, a_stride_k, mask_a, b_ptr, b_stride_k, mask_b, begin, end,
    TAIL: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    TURN_A: tl.constexpr, TURN_B: tl.constexpr,
):  # fmt: skip
    """``acc + A[:, begin:end] @ B[begin:end, :]``, ``BLOCK`` of the reduction at a time.

    ``a_ptr`` is a column of pointers to ``A[:, 0]`` and ``b_ptr`` a row of pointers to ``B[0, :]``.
    The blocks that are whole are loaded without a mask along the reduction: a mask there would cut
    16-byte loads into pieces wherever the length is no multiple of them. What is left after them
    (``TAIL``) is one masked step. ``TURN_A`` and ``TURN_B`` are as of `through_registers`.
    """
    positions = begin + tl.arange(0, BLOCK).to(tl.int64)
    a_pointers = a_ptr + (positions * a_stride_k)[None, :]
    b_pointers = b_ptr + (positions * b_stride_k)[:, None]
    a_step = tl.cast(a_stride_k, tl.int64) * BLOCK
    b_step = tl.cast(b_stride_k, tl.int64) * BLOCK
    whole = tl.maximum(end - begin, 0) // BLOCK
    for _ in range(whole):
        a = tl.load(a_pointers, mask=mask_a, other=0.0)
        b = tl.load(b_pointers, mask=mask_b, other=0.0)
        acc = dot(through_registers(a, TURN_A), through_registers(b, TURN_B), acc, PRECISION)
        a_pointers += a_step
        b_pointers += b_step
    if TAIL:
        left = positions + tl.cast(whole, tl.int64) * BLOCK < end
        a = tl.load(a_pointers, mask=mask_a & left[None, :], other=0.0)
        b = tl.load(b_pointers, mask=mask_b & left[:, None], other=0.0)
        acc = dot(through_registers(a, TURN_A), through_registers(b, TURN_B), acc, PRECISION)
    return acc


@triton.jit
def load_bias(b_ptr, positions, mask, HAS_BIAS: tl.constexpr):
    """A row of bias in float32; zeros where there is none."""
    if HAS_BIAS:
        return tl.load(b_ptr + positions, mask=mask, other=0.0).to(tl.float32)[None, :]
    return tl.zeros((1, positions.shape[0]), dtype=tl.float32)


@triton.jit(do_not_specialize=["R", "C", "R_OUT", "C_OUT"])
def _gather_kernel(
    w_ptr, rows_ptr, cols_ptr, out_ptr,
    R, C, R_OUT, C_OUT, stride_wn, stride_wk, stride_or, stride_oc,
    HAS_ROWS: tl.constexpr, HAS_COLS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of the compact copy ``W[rows][:, cols]``; zeros beyond its sizes."""
    offs_r = offsets(tl.program_id(0), BLOCK_R)
    offs_c = offsets(tl.program_id(1), BLOCK_C)
    mask_r = offs_r < R
    mask_c = offs_c < C
    rows = gather_index(rows_ptr, offs_r, mask_r, HAS_ROWS)
    cols = gather_index(cols_ptr, offs_c, mask_c, HAS_COLS)
    tile = load_tile(w_ptr, rows, stride_wn, mask_r, cols, stride_wk, mask_c)
    store_tile(out_ptr, tile, offs_r, stride_or, offs_r < R_OUT, offs_c, stride_oc, offs_c < C_OUT)


@triton.jit(do_not_specialize=["M", "N", "K"])
def _product_kernel(
    x_ptr, w_ptr, b_ptr, rows_ptr, add_ptr, h_ptr, y_ptr,
    M, N, K,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_am, stride_hm, stride_ym,
    TRANSPOSED: tl.constexpr, HAS_ROWS: tl.constexpr, PACKED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, KEEPS: tl.constexpr,
    ACTIVATION: tl.constexpr, ALIGN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
    TURN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One ``[BLOCK_M, BLOCK_N]`` tile of ``y = a(h) + residual``, ``h = x @ W[rows]^T + b[rows]``.

    ``PACKED`` says that ``w`` is ``W[rows]`` already, ``TRANSPOSED`` that neighbours in a row of
    its memory are outputs rather than terms of a sum. ``KEEPS`` also writes ``h``. ``TURN``: the
    weight goes `through_registers`.
    """
    N = with_alignment(N, ALIGN)
    stride_xm = with_alignment(stride_xm, ALIGN)
    if TRANSPOSED:
        stride_wk = with_alignment(stride_wk, ALIGN)
    else:
        stride_wn = with_alignment(stride_wn, ALIGN)
    stride_ym = with_alignment(stride_ym, ALIGN)
    pid_m, pid_n = swizzle(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    offs_m = offsets(pid_m, BLOCK_M)
    offs_n = offsets(pid_n, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N
    rows = gather_index(rows_ptr, offs_n, mask_n, HAS_ROWS)

    acc = multiply(
        tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32),
        x_ptr + (offs_m * stride_xm)[:, None], stride_xk, mask_m[:, None],
        w_ptr + ((offs_n if PACKED else rows) * stride_wn)[None, :], stride_wk, mask_n[None, :],
        0, K, TAIL, BLOCK_K, PRECISION, False, TURN,
    )  # fmt: skip

    acc += load_bias(b_ptr, rows, mask_n, HAS_BIAS)
    if KEEPS:
        store_tile(h_ptr, acc, offs_m, stride_hm, mask_m, offs_n, 1, mask_n)
    acc = activation_value(acc, ACTIVATION)
    if HAS_RESIDUAL:
        acc += load_tile(add_ptr, offs_m, stride_am, mask_m, offs_n, 1, mask_n).to(tl.float32)
    store_tile(y_ptr, acc, offs_m, stride_ym, mask_m, offs_n, 1, mask_n)


@triton.jit(do_not_specialize=["M", "N", "K"])
def _gated_kernel(
    x_ptr, gate_ptr, up_ptr, gate_bias_ptr, up_bias_ptr, y_ptr,
    M, N, K,
    stride_xm, stride_xk, stride_gn, stride_gk, stride_un, stride_uk, stride_ym,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    ALIGN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of ``a(x @ Wg^T + bg) * (x @ Wu^T + bu)``: each tile of ``x`` is loaded once."""
    N = with_alignment(N, ALIGN)
    stride_xm = with_alignment(stride_xm, ALIGN)
    stride_ym = with_alignment(stride_ym, ALIGN)
    pid_m, pid_n = swizzle(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    offs_m = offsets(pid_m, BLOCK_M)
    offs_n = offsets(pid_n, BLOCK_N)
    mask_m = offs_m < M
    mask_n = offs_n < N

    positions = tl.arange(0, BLOCK_K).to(tl.int64)
    x_pointers = x_ptr + (offs_m * stride_xm)[:, None] + (positions * stride_xk)[None, :]
    gate_pointers = gate_ptr + (positions * stride_gk)[:, None] + (offs_n * stride_gn)[None, :]
    up_pointers = up_ptr + (positions * stride_uk)[:, None] + (offs_n * stride_un)[None, :]
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    whole = K // BLOCK_K
    for _ in range(whole):
        x_tile = tl.load(x_pointers, mask=mask_m[:, None], other=0.0)
        gate = dot(x_tile, tl.load(gate_pointers, mask=mask_n[None, :], other=0.0), gate, PRECISION)
        up = dot(x_tile, tl.load(up_pointers, mask=mask_n[None, :], other=0.0), up, PRECISION)
        x_pointers += tl.cast(stride_xk, tl.int64) * BLOCK_K
        gate_pointers += tl.cast(stride_gk, tl.int64) * BLOCK_K
        up_pointers += tl.cast(stride_uk, tl.int64) * BLOCK_K
    if TAIL:
        left = positions < K - whole * BLOCK_K
        mask = left[:, None] & mask_n[None, :]
        x_tile = tl.load(x_pointers, mask=mask_m[:, None] & left[None, :], other=0.0)
        gate = dot(x_tile, tl.load(gate_pointers, mask=mask, other=0.0), gate, PRECISION)
        up = dot(x_tile, tl.load(up_pointers, mask=mask, other=0.0), up, PRECISION)

    gate += load_bias(gate_bias_ptr, offs_n, mask_n, HAS_BIAS)
    up += load_bias(up_bias_ptr, offs_n, mask_n, HAS_BIAS)
    y = activation_value(gate, ACTIVATION) * up
    store_tile(y_ptr, y, offs_m, stride_ym, mask_m, offs_n, 1, mask_n)


@triton.jit(do_not_specialize=["M", "R", "C", "chunk"])
def _product_dw_kernel(
    gy_ptr, x_ptr, out_ptr,
    M, R, C, chunk,
    stride_gm, stride_gr, stride_xm, stride_xc, stride_os, stride_on,
    ALIGN: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr, TURN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One ``[BLOCK_R, BLOCK_C]`` tile of ``grad_y^T @ x`` over the tokens of one slice.

    ``TURN``: both operands go `through_registers`.
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

    acc = multiply(
        tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32),
        gy_ptr + (offs_r * stride_gr)[:, None], stride_gm, mask_r[:, None],
        x_ptr + (offs_c * stride_xc)[None, :], stride_xm, mask_c[None, :],
        begin, tl.minimum(begin + chunk, M), TAIL, BLOCK_M, PRECISION, TURN, TURN,
    )  # fmt: skip
    store_tile(out_ptr + piece * stride_os, acc, offs_r, stride_on, mask_r, offs_c, 1, mask_c)


@triton.jit
def find(index_ptr, size, wanted, HAS_INDEX: tl.constexpr, STEPS: tl.constexpr):
    """Where in the sorted index each of ``wanted`` stands, or would stand; and whether it does."""
    place, found = wanted, wanted < size
    if HAS_INDEX:
        low = tl.zeros_like(wanted)
        high = low + size
        for _ in tl.static_range(STEPS):
            middle = (low + high) // 2
            searching = low < high
            here = tl.load(index_ptr + middle, mask=searching, other=0)
            low, high = (
                tl.where(searching & (here < wanted), middle + 1, low),
                tl.where(searching & (here >= wanted), middle, high),
            )
        place = low
        found = tl.load(index_ptr + low, mask=low < size, other=-1) == wanted
    return place, found


@triton.jit(do_not_specialize=["S", "R", "C", "N", "K"])
def _scatter_sum_kernel(
    part_ptr, rows_ptr, cols_ptr, out_ptr,
    S, R, C, N, K, stride_ps, stride_pr, stride_on,
    HAS_ROWS: tl.constexpr, HAS_COLS: tl.constexpr,
    STEPS_R: tl.constexpr, STEPS_C: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of the full-size gradient: the sum of the ``S`` slices, in their order, or zero.

    Each program looks up which of its rows and columns are kept, so that one pass writes the sums
    and the zeros between them.
    """
    offs_n = offsets(tl.program_id(0), BLOCK_N)
    offs_k = offsets(tl.program_id(1), BLOCK_K)
    rows, kept_r = find(rows_ptr, R, offs_n, HAS_ROWS, STEPS_R)
    cols, kept_c = find(cols_ptr, C, offs_k, HAS_COLS, STEPS_C)
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for piece in range(S):
        base = part_ptr + tl.cast(piece, tl.int64) * stride_ps
        acc += load_tile(base, rows, stride_pr, kept_r, cols, 1, kept_c).to(tl.float32)
    store_tile(out_ptr, acc, offs_n, stride_on, offs_n < N, offs_k, 1, offs_k < K)
