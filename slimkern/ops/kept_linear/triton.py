"""The equations on GPUs.

The copies are made, and the gradients spread over full-size weights, in one pass each. Products
that nothing is fused to are left to torch's own where the operands lie as the matrix units want
them, which compact copies do: there they take less time, and a call of them less of the host's.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code has no Python types: its arguments are pointers, tensors or constants by turns.

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from slimkern.ops._gemm import product, product_dw, scatter_sum
from slimkern.ops._rows import row_slices
from slimkern.ops._tile import (
    ON_AMD,
    Tile,
    bucket,
    check_dtype,
    contiguous,
    gather_index,
    launch_options,
    load_tile,
    offsets,
    on_device,
    store_tile,
)

Index = Tensor | None


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
def _load_heads(grad_ptr, batch, token, head, at, mask, stride_b, stride_h, stride_t, stride_d):
    """[rows, columns] of a gradient [B, heads, T, d]; zeros where the mask is off."""
    rows = batch * stride_b + token * stride_t
    columns = head * stride_h + at * stride_d
    return tl.load(grad_ptr + rows[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _joined_heads_kernel(
    g0_ptr, g1_ptr, g2_ptr, out_ptr, part_ptr,
    M, T, HEADS, D, chunk,
    b0, h0, t0, d0, b1, h1, t1, d1, b2, h2, t2, d2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Columns of slice ``program_id(1)`` of the tokens: gradients side by side, and their sums."""
    piece = tl.cast(tl.program_id(1), tl.int64)
    width = HEADS * D
    offs_n = offsets(tl.program_id(0), BLOCK_N)
    mask_n = offs_n < 3 * width
    which = offs_n // width
    within = offs_n - which * width
    head = within // D
    at = within - head * D
    begin = piece * chunk
    end = tl.minimum(begin + chunk, M)

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for block in range(tl.cdiv(end - begin, BLOCK_M)):
        offs_m = begin + offsets(block, BLOCK_M)
        mask_m = offs_m < end
        batch = offs_m // T
        token = offs_m - batch * T
        mask = mask_m[:, None] & mask_n[None, :]
        q = mask & (which == 0)[None, :]
        k = mask & (which == 1)[None, :]
        v = mask & (which == 2)[None, :]
        tile = _load_heads(g0_ptr, batch, token, head, at, q, b0, h0, t0, d0)
        tile += _load_heads(g1_ptr, batch, token, head, at, k, b1, h1, t1, d1)
        tile += _load_heads(g2_ptr, batch, token, head, at, v, b2, h2, t2, d2)
        store_tile(out_ptr, tile, offs_m, 3 * width, mask_m, offs_n, 1, mask_n)
        total += tile
    tl.store(part_ptr + piece * 3 * width + offs_n, tl.sum(total, axis=0), mask=mask_n)


_COPY = Tile(16, 128, 1, warps=4, stages=2)


def kept_weights(
    weights: list[Tensor],
    biases: list[Index],
    rows: list[Index],
    cols: Index,
    dtype: torch.dtype,
    multiple: int,
) -> tuple[Tensor, Tensor]:
    """Weights [N, K], biases [N] -> V [R', C'] and b [R'] in ``dtype``; b empty without biases.

    One or three weights, of which equally many rows are kept.

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    for weight in weights:
        check_dtype("weight", weight)
    rows, cols = [contiguous(r) for r in rows], contiguous(cols)
    indexed = rows[0] is not None
    R = weights[0].shape[0] if rows[0] is None else rows[0].shape[0]
    C = weights[0].shape[1] if cols is None else cols.shape[0]
    step = multiple if indexed else 1
    R_out = triton.cdiv(len(weights) * R, step) * step
    C_out = C if cols is None else triton.cdiv(C, multiple) * multiple
    whole = any(b is not None for b in biases)
    device = weights[0].device
    out = torch.empty((R_out, C_out), dtype=dtype, device=device)
    shift = torch.empty((R_out if whole else 0,), dtype=dtype, device=device)
    if out.numel() == 0 and shift.numel() == 0:
        return out, shift
    first = [0] * 3 if len(weights) == 1 else [0, 1, 2]
    present = sum(1 << i for i, b in enumerate(biases) if b is not None)
    biases = [contiguous(b) for b in biases]
    grid = (triton.cdiv(R_out, _COPY.a), triton.cdiv(max(C_out, 1), _COPY.b))
    with on_device(out):
        _kept_weights_kernel[grid](
            *(weights[i] for i in first), *(biases[i] for i in first), *(rows[i] for i in first),
            cols, out, shift,
            R, C, R_out, C_out, *(s for i in first for s in weights[i].stride()),
            PARTS=len(weights), HAS_ROWS=indexed, HAS_COLS=cols is not None, BIASES=present,
            BLOCK_R=_COPY.a, BLOCK_C=_COPY.b,
            **launch_options(_COPY),
        )  # fmt: skip
    return out, shift


def _fits_blas(*operands: Tensor) -> bool:
    """Whether torch's own product is the faster one: on a GPU, with aligned rows."""
    return all(
        t.is_cuda and t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0
        for t in operands
    )


def kept_linear_fwd(x: Tensor, w: Tensor, bias: Index, activation: str) -> tuple[Tensor, Tensor]:
    """x [M, C'] -> a(h) and h [M, R'] with h = x @ Vᵀ + b; h is empty where a is none.

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    check_dtype("x", x)
    if activation != "none":
        a, h = product(x, w, bias, activation=activation, keep_input=True)
        return a, h
    empty = torch.empty((0, w.shape[0]), dtype=x.dtype, device=x.device)
    if _fits_blas(x, w):
        return F.linear(x, w, bias), empty
    return product(x, w, bias), empty


def kept_linear_dx(grad: Tensor, w: Tensor, add: Index, dtype: torch.dtype) -> Tensor:
    """grad [M, R'] -> grad @ V, added to ``add`` [M, C'] where there is one, in ``dtype``.

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    check_dtype("grad", grad)
    if add is None and dtype == grad.dtype and _fits_blas(grad, w):
        return grad @ w
    out = torch.empty((grad.shape[0], w.shape[1]), dtype=dtype, device=grad.device)
    return product(grad, w.t(), residual=add, out=out)


def _compact_dw(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """gradᵀ @ x in ``dtype``."""
    if _fits_blas(grad, x) and not ON_AMD:
        if dtype == grad.dtype:
            return grad.t() @ x
        if dtype == torch.float32:
            return torch.mm(grad.t(), x, out_dtype=dtype)
    out = torch.empty((grad.shape[1], x.shape[1]), dtype=dtype, device=grad.device)
    return product_dw(grad, x, out=out)


def kept_linear_dw(
    grad: Tensor, x: Tensor, rows: list[Index], cols: Index, N: int, K: int, dtype: torch.dtype
) -> list[Tensor]:
    """grad [M, R'], x [M, C'] -> a gradient [N, K] in ``dtype`` for each of ``rows``.

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    check_dtype("grad", grad)
    if cols is None and all(r is None for r in rows):
        return [_compact_dw(grad[:, i * N : (i + 1) * N], x, dtype) for i in range(len(rows))]
    kept, found, at = _compact_dw(grad, x, dtype), [], 0
    C = K if cols is None else cols.shape[0]
    for r in rows:
        count = N if r is None else r.shape[0]
        out = torch.empty((N, K), dtype=dtype, device=grad.device)
        part = kept[None, at : at + count]
        scatter_sum(part, count, C, contiguous(r), contiguous(cols), out)
        found.append(out)
        at += count
    return found


def kept_sums(sums: Tensor, rows: list[Index], N: int, dtype: torch.dtype) -> list[Tensor]:
    """sums [R'] -> a gradient [N] in ``dtype`` for each of ``rows``: zero where nothing is kept."""
    found, at = [], 0
    for r in rows:
        count = N if r is None else r.shape[0]
        out = torch.empty((N,), dtype=dtype, device=sums.device)
        part = sums[None, None, at : at + count]
        scatter_sum(part, 1, count, None, contiguous(r), out[None])
        found.append(out)
        at += count
    return found


def joined_heads(grads: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Three grads [B, heads, T, d] -> side by side [B T, 3 heads d] in ``dtype``; sums over rows.

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    q, k, v = grads
    check_dtype("grads", q)
    B, H, T, d = q.shape
    M, width = B * T, 3 * H * d
    out = torch.empty((M, width), dtype=dtype, device=q.device)
    if out.numel() == 0:
        return out, torch.zeros(width, dtype=torch.float32, device=q.device)
    block = min(_COPY.b, bucket(width))
    columns = triton.cdiv(width, block)
    slices, chunk = row_slices(columns, M, _COPY.a)
    part = torch.empty((slices, width), dtype=torch.float32, device=q.device)
    with on_device(q):
        _joined_heads_kernel[(columns, slices)](
            q, k, v, out, part,
            M, T, H, d, chunk, *q.stride(), *k.stride(), *v.stride(),
            BLOCK_M=_COPY.a, BLOCK_N=block,
            **launch_options(_COPY),
        )  # fmt: skip
    return out, part.sum(0)
