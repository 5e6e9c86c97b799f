"""The equation on the C++ row kernels: outputs and scratch are allocated here, nothing there."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkern.ops import _native
from slimkern.ops._drop import dropped
from slimkern.ops._native import neighbours, rows_of


def _floats(vector: Tensor) -> Tensor:
    return vector.float().contiguous()


def add_norm_fwd(
    x: Tensor,
    residual: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    seed: Tensor | None,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual [M, N], gamma, beta [N] -> y in residual's dtype, s [M, N], stats [M, 3]."""
    x = neighbours(x) if seed is None else dropped(x, seed, p)
    residual = neighbours(residual)
    gamma, beta = _floats(gamma), _floats(beta)
    M, N = residual.shape
    y = torch.empty((M, N), dtype=residual.dtype)
    s = torch.empty((M, N), dtype=torch.float32)
    stats = torch.empty((M, 3), dtype=torch.float32)
    _native.norm_forward(
        _native.dtype_code(x, "x"), _native.dtype_code(residual, "residual"),
        (rows_of(x), rows_of(residual), rows_of(y), rows_of(s)),
        (stats.data_ptr(), gamma.data_ptr(), beta.data_ptr()), eps, M, N, _native.threads(),
    )  # fmt: skip
    return y, s, stats


def add_norm_grad(
    grad: Tensor,
    s: Tensor,
    stats: Tensor,
    gamma: Tensor,
    narrow: bool,
    seed: Tensor | None,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad, s [M, N] -> ds in grad's dtype, that of x where it is another tensor, sums [3, N]."""
    grad, gamma = neighbours(grad), _floats(gamma)
    M, N = s.shape
    ds = torch.empty((M, N), dtype=grad.dtype)
    low = torch.empty((M, N) if narrow else 0, dtype=torch.bfloat16)
    sums = torch.empty((3, N), dtype=torch.float32)
    size = _native.row_sums_scratch(M, N, 3)
    scratch = torch.empty(size, dtype=torch.float32)
    _native.norm_grad(
        _native.dtype_code(low, "x"), _native.dtype_code(grad, "grad"),
        (rows_of(grad), rows_of(s), rows_of(ds), rows_of(low) if narrow else (0, 0)),
        (stats.data_ptr(), gamma.data_ptr(), sums.data_ptr()), M, N, _native.threads(),
        scratch.data_ptr(), size,
    )  # fmt: skip
    if not narrow:
        low = low.to(grad.dtype)
    if seed is not None:
        low = dropped(low if narrow else ds, seed, p)
        sums[2] = low.sum(0, dtype=torch.float32)
    return ds, low, sums
