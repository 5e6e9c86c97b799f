"""The registered ops of masked linears on compact copies; functions above have the gradients.

What is kept of a weight is copied once a step, in the dtype of the products, and serves forward and
backward. Kept rows or columns may be padded with zeros up to a multiple (`MULTIPLE`): the padded
channels are zero from the first product to the last, so that nothing between has an odd width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimkern.ops._registry import TRITON_DTYPES, Backends, define_op

BACKENDS = Backends(
    __package__,
    default={"cpu": "reference", "cuda": "triton", "meta": "reference"},
    units="none",
    dtypes={"triton": TRITON_DTYPES},
)
MULTIPLE = 64  # elements: rows of half-precision numbers then start on 128-byte boundaries
Index = Tensor | None


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def kept_shape(
    weights: list[Tensor], rows: list[Index], cols: Index, multiple: int
) -> tuple[int, int]:
    """The shape of `kept_weights`' copy: only what is indexed is padded."""
    R = sum(w.shape[0] if r is None else r.shape[0] for w, r in zip(weights, rows))
    C = weights[0].shape[1] if cols is None else cols.shape[0]
    R = R if all(r is None for r in rows) else _padded(R, multiple)
    return R, C if cols is None else _padded(C, multiple)


def _fake_weights(
    weights: list[Tensor],
    biases: list[Index],
    rows: list[Index],
    cols: Index,
    dtype: torch.dtype,
    multiple: int,
) -> tuple[Tensor, Tensor]:
    R, C = kept_shape(weights, rows, cols, multiple)
    whole = any(b is not None for b in biases)
    make = weights[0].new_empty
    return make(R, C, dtype=dtype), make(R if whole else 0, dtype=dtype)


def _fake_fwd(x: Tensor, w: Tensor, bias: Index, activation: str) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], w.shape[0])
    return x.new_empty(shape), x.new_empty((0, w.shape[0]) if activation == "none" else shape)


def _fake_dx(grad: Tensor, w: Tensor, add: Index, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(grad.shape[0], w.shape[1], dtype=dtype)


def _fake_dw(
    grad: Tensor, x: Tensor, rows: list[Index], cols: Index, N: int, K: int, dtype: torch.dtype
) -> list[Tensor]:
    return [grad.new_empty(N, K, dtype=dtype) for _ in rows]


def _fake_sums(sums: Tensor, rows: list[Index], N: int, dtype: torch.dtype) -> list[Tensor]:
    return [sums.new_empty(N, dtype=dtype) for _ in rows]


def _fake_heads(grads: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    B, H, T, d = grads[0].shape
    width = len(grads) * H * d
    wide = torch.promote_types(dtype, torch.float32)
    return grads[0].new_empty(B * T, width, dtype=dtype), grads[0].new_empty(width, dtype=wide)


kept_weights = define_op(
    "kept_weights",
    "Tensor[] weights, Tensor?[] biases, Tensor?[] rows, Tensor? cols, ScalarType dtype, "
    "int multiple",
    _fake_weights,
    BACKENDS,
    "(Tensor, Tensor)",
)
kept_linear_fwd = define_op(
    "kept_linear_fwd",
    "Tensor x, Tensor w, Tensor? bias, str activation",
    _fake_fwd,
    BACKENDS,
    "(Tensor, Tensor)",
)
kept_linear_dx = define_op(
    "kept_linear_dx", "Tensor grad, Tensor w, Tensor? add, ScalarType dtype", _fake_dx, BACKENDS
)
kept_linear_dw = define_op(
    "kept_linear_dw",
    "Tensor grad, Tensor x, Tensor?[] rows, Tensor? cols, SymInt N, SymInt K, ScalarType dtype",
    _fake_dw,
    BACKENDS,
    "Tensor[]",
)
kept_sums = define_op(
    "kept_sums",
    "Tensor sums, Tensor?[] rows, SymInt N, ScalarType dtype",
    _fake_sums,
    BACKENDS,
    "Tensor[]",
    ("backward",),
)
joined_heads = define_op(
    "joined_heads",
    "Tensor[] grads, ScalarType dtype",
    _fake_heads,
    BACKENDS,
    "(Tensor, Tensor)",
    ("backward",),
)
