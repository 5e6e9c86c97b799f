"""The equation on the C++ row kernels: outputs and scratch are allocated here, nothing there."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkern.ops import _native
from slimkern.ops._native import neighbours, rows_of


def activation_fwd(x: Tensor, activation: str) -> Tensor:
    """a(x), [M, N]."""
    x = neighbours(x)
    y = torch.empty(x.shape, dtype=x.dtype)
    code = _native.dtype_code(x, "x")
    _native.activate(
        code, _native.ACTIVATIONS[activation], rows_of(x), rows_of(y), *x.shape, _native.threads()
    )
    return y


def activation_grad(grad: Tensor, x: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """grad, x [M, N] -> dx [M, N], a(x) [M, N], the sum of dx over rows [N], float32."""
    grad, x = neighbours(grad), neighbours(x)
    M, N = x.shape
    dx, value = torch.empty((M, N), dtype=x.dtype), torch.empty((M, N), dtype=x.dtype)
    sums = torch.empty(N, dtype=torch.float32)
    size = _native.row_sums_scratch(M, N, 1)
    scratch = torch.empty(size, dtype=torch.float32)
    places = (rows_of(grad), rows_of(x), rows_of(dx), rows_of(value))
    _native.activation_grad(
        _native.dtype_code(x, "x"), _native.ACTIVATIONS[activation], places, sums.data_ptr(), M, N,
        _native.threads(), scratch.data_ptr(), size,
    )  # fmt: skip
    return dx, value, sums
