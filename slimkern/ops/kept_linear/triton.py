"""The equations on GPUs.

The copies are made, and the gradients spread over full-size weights, in one pass each. Products
that nothing is fused to are left to torch's own where the operands lie as the matrix units want
them, which compact copies do: there they take less time, and a call of them less of the host's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from slimkern.ops._gemm import product, product_dw, scatter_sum
from slimkern.ops._kept_kernels import _joined_heads_kernel, _kept_weights_kernel
from slimkern.ops._launch import launch
from slimkern.ops._rows import row_slices
from slimkern.ops._tile import (
    ON_AMD,
    Tile,
    bucket,
    check_dtype,
    contiguous,
    launch_options,
)
from slimkern.ops.activation.triton import activation_fwd

Index = Tensor | None


# Newer torch's products of halves give float32 on NVIDIA GPUs: gradients of float32 weights then
# are rounded once, and need no pass to widen them.
_MIXED = hasattr(torch.ops.aten.mm, "dtype") and not ON_AMD
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
    launch(_kept_weights_kernel, grid, out)(
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
    # Of half-precision numbers the product with its epilogue costs what cuBLAS and a pass over its
    # result do; float32 products have no matrix unit, and there cuBLAS's are far faster.
    plain = _fits_blas(x, w) and (activation == "none" or x.dtype == torch.float32)
    if activation != "none" and not plain:
        a, h = product(x, w, bias, activation=activation, keep_input=True)
        return a, h
    h = F.linear(x, w, bias) if plain else product(x, w, bias)
    if activation == "none":
        return h, torch.empty((0, w.shape[0]), dtype=x.dtype, device=x.device)
    return activation_fwd(h, activation), h


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
    if _fits_blas(grad, x):
        if dtype == grad.dtype:
            return grad.t() @ x
        if dtype == torch.float32 and _MIXED:
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
    sums = sums.contiguous()  # columns of what is spread adjoin
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
        TypeError: a dtype other than float32, float16 or bfloat16, or several of them.
    """
    q, k, v = grads
    check_dtype("grads", q)
    if not q.dtype == k.dtype == v.dtype:
        given = f"{q.dtype}, {k.dtype} and {v.dtype}"
        raise TypeError(f"grads have dtypes {given}; backend 'triton' accepts one for all")
    B, H, T, d = q.shape
    M, width = B * T, 3 * H * d
    out = torch.empty((M, width), dtype=dtype, device=q.device)
    if out.numel() == 0:
        return out, torch.zeros(width, dtype=torch.float32, device=q.device)
    tile = _COPY._replace(b=min(_COPY.b, bucket(H * d)))
    columns = triton.cdiv(H * d, tile.b)
    slices, chunk = row_slices(3 * columns, M, tile.a)
    part = torch.empty((slices, width), dtype=torch.float32, device=q.device)
    launch(_joined_heads_kernel, (columns, slices, 3), q)(
        q, k, v, out, part,
        M, T, H, d, chunk, *q.stride(), *k.stride(), *v.stride(),
        BLOCK_M=tile.a, BLOCK_N=tile.b,
        **launch_options(tile),
    )  # fmt: skip
    return out, part.sum(0)
