"""The equations in plain torch, for any device and floating dtype; the oracle of the kernels.

With V the kept rows (of one weight after the other) and columns, padded with zeros:

    y = a(h),  h = x @ Vᵀ + b;    dx = dy @ V (+ add);    dW[rows][:, cols] = dyᵀ @ x, else zero
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slimkern.ops.activation.reference import activation_fwd

Index = Tensor | None


def _padding(count: int, indexed: bool, multiple: int) -> int:
    return -count % multiple if indexed else 0


def kept_weights(
    weights: list[Tensor],
    biases: list[Index],
    rows: list[Index],
    cols: Index,
    dtype: torch.dtype,
    multiple: int,
) -> tuple[Tensor, Tensor]:
    """Weights [N, K], biases [N] -> V [R', C'] and b [R'] in ``dtype``; b empty without biases.

    R' and C' are the numbers of kept rows, in all, and columns; what is indexed is padded with
    zeros up to ``multiple``.
    """
    parts = [w if r is None else w.index_select(0, r) for w, r in zip(weights, rows)]
    V = torch.cat([p if cols is None else p.index_select(1, cols) for p in parts])
    below = _padding(V.shape[0], any(r is not None for r in rows), multiple)
    beside = _padding(V.shape[1], cols is not None, multiple)
    V = F.pad(V.to(dtype), (0, beside, 0, below))
    if all(b is None for b in biases):
        return V.contiguous(), V.new_empty(0)
    shifts = [
        w.new_zeros(p.shape[0]) if b is None else (b if r is None else b.index_select(0, r))
        for w, p, b, r in zip(weights, parts, biases, rows)
    ]
    return V.contiguous(), F.pad(torch.cat(shifts).to(dtype), (0, below))


def kept_linear_fwd(x: Tensor, w: Tensor, bias: Index, activation: str) -> tuple[Tensor, Tensor]:
    """x [M, C'] -> a(h) and h [M, R'] with h = x @ Vᵀ + b; h is empty where a is none."""
    h = F.linear(x, w, bias)
    if activation == "none":
        return h, h.new_empty(0, w.shape[0])
    return activation_fwd(h, activation), h


def kept_linear_dx(grad: Tensor, w: Tensor, add: Index, dtype: torch.dtype) -> Tensor:
    """grad [M, R'] -> grad @ V, added to ``add`` [M, C'] where there is one, in ``dtype``."""
    dx = (grad @ w).to(dtype)
    return dx if add is None else (dx + add).to(dtype)


def kept_linear_dw(
    grad: Tensor, x: Tensor, rows: list[Index], cols: Index, N: int, K: int, dtype: torch.dtype
) -> list[Tensor]:
    """grad [M, R'], x [M, C'] -> a gradient [N, K] in ``dtype`` for each of ``rows``.

    The columns of grad are those of one weight after the other; those of padding are left out.
    """
    kept = (grad.t() @ x).to(dtype)
    found, at = [], 0
    for r in rows:
        count = N if r is None else r.shape[0]
        part = kept[at : at + count]
        if cols is not None:
            part = part.new_zeros(count, K).index_copy_(1, cols, part[:, : cols.shape[0]])
        found.append(part.clone() if r is None else part.new_zeros(N, K).index_copy_(0, r, part))
        at += count
    return found


def kept_sums(sums: Tensor, rows: list[Index], N: int, dtype: torch.dtype) -> list[Tensor]:
    """sums [R'] -> a gradient [N] in ``dtype`` for each of ``rows``: zero where nothing is kept."""
    found, at = [], 0
    for r in rows:
        count = N if r is None else r.shape[0]
        part = sums[at : at + count].to(dtype)
        found.append(part.clone() if r is None else part.new_zeros(N).index_copy_(0, r, part))
        at += count
    return found


def joined_heads(grads: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """grads [B, heads, T, d] -> side by side [B T, parts heads d] in ``dtype``; sums over rows."""
    side = torch.stack([g.transpose(1, 2) for g in grads], 2).flatten(2).flatten(0, 1)
    wide = torch.promote_types(dtype, torch.float32)
    return side.to(dtype).contiguous(), side.sum(0, dtype=wide)
