"""What masked blocks are put together from: linears of which a part is computed.

Weights have their full size, and so have their gradients, which are zero outside the kept part.
Under autocast a weight is gathered first and then narrowed, so that what is cast is the kept part
alone; the gradient is widened where it is scattered. A block is written once, in terms of
`Linear`; on a CPU that gathers in each product, on a GPU (`CompactLinear`) once a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from slimkern.ops.activation import activation_fwd
from slimkern.ops.activation.api import BACKENDS as ROWS
from slimkern.ops.indexed_linear.api import BACKENDS as LINEARS
from slimkern.ops.kept_linear import (
    kept_linear_dw,
    kept_linear_dx,
    kept_linear_fwd,
    kept_sums,
    kept_weights,
)
from slimkern.ops.kept_linear.api import BACKENDS as COMPACT

_ops: Any = torch.ops.slimkern
Tensors = tuple[Tensor, ...]
Vectors = tuple[Tensor | None, ...]
Dtypes = tuple[torch.dtype | None, ...]


@dataclass(frozen=True)
class Backend:
    """Which implementation computes the linears, and which the passes over rows."""

    linears: str
    rows: str

    @classmethod
    def choose(cls, backend: str | None, x: Tensor, dtype: torch.dtype) -> Backend:
        """The backends for a tensor, and products in ``dtype``.

        Raises:
            ValueError: an unknown backend, or one that does not run on the tensor's device.
        """
        # Where one of the two is float64, all is computed by plain torch, on every device.
        both = torch.promote_types(x.dtype, dtype)
        on_gpu = COMPACT.choose(backend, x.device, both)
        if on_gpu == "triton":
            return cls(on_gpu, on_gpu)
        linears = LINEARS.choose(backend, x.device, dtype)
        kernels = {x.dtype, dtype} <= {torch.float32, torch.bfloat16}
        wanted = None if kernels and backend != "reference" else "reference"
        return cls(linears, ROWS.choose(wanted, x.device, both))

    @property
    def compact(self) -> bool:
        """Whether the kept part of a weight is copied once a step, and all work done on copies."""
        return self.linears == "triton"


@dataclass(frozen=True)
class Linear:
    """A linear as the ops take it: gathered inside them.

    Attributes:
        weight: full size with its index, or the kept part in autocast's dtype without one.
        rows, cols: the index, or None.
        by: who computes it.
        bias: [R] or, where ``rows`` is there, full size; in the dtype of the products. Backwards
            need none.
    """

    weight: Tensor
    rows: Tensor | None
    cols: Tensor | None
    by: Backend
    bias: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [M, C] -> [M, R]."""
        y: Tensor = _ops.indexed_linear_fwd.default(
            x, self.weight, self.bias, self.rows, self.cols, self.by.linears
        )
        return y

    def activated(self, x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
        """x [M, C] -> a(h) and h, both [M, R]."""
        h = self.forward(x)
        return activation_fwd(h, activation, self.by.rows), h

    def dx(self, grad: Tensor) -> Tensor:
        """dy [M, R] -> dx [M, C]."""
        dx: Tensor = _ops.indexed_linear_dx.default(
            grad, self.weight, self.rows, self.cols, self.by.linears
        )
        return dx

    def dx_onto(self, grad: Tensor, to_x: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The gradient of x through the linear, and that through the residual, in ``dtype``."""
        dx = self.dx(grad)
        if to_x is None:
            return dx.to(dtype)
        return dx.add_(to_x) if dx.dtype == dtype else to_x + dx


class CompactLinear(Linear):
    """The copy of the kept part, made once a step and kept for the backward.

    All copies together take the kept weights' memory in the products' dtype: at most an eighth of
    what weights, gradients and AdamW's moments take under autocast, a quarter without. In return,
    the backward does not gather again.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [M, C'] -> [M, R']."""
        y: Tensor = kept_linear_fwd(x, self.weight, self.bias, "none", self.by.linears)[0]
        return y

    def activated(self, x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
        """x [M, C'] -> a(h) and h, both [M, R']."""
        if activation == "none":
            return super().activated(x, activation)
        a, h = kept_linear_fwd(x, self.weight, self.bias, activation, self.by.linears)
        return a, h

    def dx(self, grad: Tensor) -> Tensor:
        """dy [M, R'] -> dx [M, C']."""
        return self.dx_onto(grad, None, grad.dtype)

    def dx_onto(self, grad: Tensor, to_x: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The gradient of x through the linear, and that through the residual, in ``dtype``."""
        dx: Tensor = kept_linear_dx(grad, self.weight, to_x, dtype, self.by.linears)
        return dx


def joined_linear(
    weights: Tensors,
    biases: Vectors,
    rows: Vectors,
    cols: Tensor | None,
    dtype: torch.dtype,
    by: Backend,
    multiple: int = 1,
) -> Linear:
    """The linear of one weight, or of three one below the other, for inputs of ``dtype``.

    Args:
        weights, biases, rows: full size, what is kept of them; None for all, or no bias.
        cols: kept columns of all; None for all.
        dtype: of the products.
        by: who computes it.
        multiple: compact copies are padded with zeros up to it, where they are indexed.
    """
    single = len(weights) == 1 and weights[0].dtype == dtype
    if by.compact:
        if single and rows[0] is None and cols is None:
            bias = biases[0]
            return CompactLinear(weights[0], None, None, by, bias)
        copy, shift = kept_weights(
            list(weights), list(biases), list(rows), cols, dtype, multiple, by.linears
        )
        return CompactLinear(copy, None, None, by, shift if shift.numel() else None)
    if single:
        bias = None if biases[0] is None else biases[0].to(dtype)
        return Linear(weights[0], rows[0], cols, by, bias)
    parts = [kept_part(w, r, cols).to(dtype) for w, r in zip(weights, rows)]
    weight = parts[0] if len(parts) == 1 else torch.cat(parts)
    if all(b is None for b in biases):
        return Linear(weight, None, None, by)
    shifts = [
        part.new_zeros(part.shape[0])
        if b is None
        else (b if r is None else b.index_select(0, r)).to(dtype)
        for part, b, r in zip(parts, biases, rows)
    ]
    return Linear(weight, None, None, by, shifts[0] if len(shifts) == 1 else torch.cat(shifts))


def saved_linear(
    weight: Tensor, rows: Tensor | None, cols: Tensor | None, indexed: bool, by: Backend
) -> Linear:
    """The linear of a forward again, from the weight that it saved; ``indexed`` as it was there."""
    make = CompactLinear if by.compact else Linear
    return make(weight, rows if indexed else None, cols if indexed else None, by)


def kept_part(weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """W[rows][:, cols]; the weight itself where both are None."""
    if rows is not None:
        weight = weight.index_select(0, rows)
    return weight if cols is None else weight.index_select(1, cols)


def weight_grads(
    grad: Tensor,
    x: Tensor,
    rows: Vectors,
    cols: Tensor | None,
    shape: torch.Size,
    dtypes: Dtypes,
    by: Backend,
) -> list[Tensor | None]:
    """dW of each weight's own size: (dyᵀ x) at the kept rows and columns, else zero.

    Args:
        grad: [M, R], for one weight after the other.
        x: [M, C].
        rows: kept rows of each, or None; ``cols`` likewise, of all.
        shape: of each weight.
        dtypes: of each gradient; None where it is not wanted.
        by: who computes it.
    """
    N, K = shape
    if by.compact:
        made = kept_linear_dw(grad, x, list(rows), cols, N, K, _widest(dtypes), by.linears)
        return [dw if k is None else dw.to(k) for dw, k in zip(made, dtypes)]
    found: list[Tensor | None] = []
    for part, r, dtype in zip(_split(grad, rows, N), rows, dtypes):
        if dtype is None:
            found.append(None)
            continue
        if x.dtype == dtype:
            found.append(_ops.indexed_linear_dw.default(part, x, r, cols, N, K, by.linears))
            continue
        C = x.shape[1]
        kept = _ops.indexed_linear_dw.default(part, x, None, None, part.shape[1], C, by.linears).to(
            dtype
        )
        if cols is not None:
            wide = kept.new_zeros(kept.shape[0], K)
            kept = wide.scatter_(1, cols.expand(kept.shape[0], -1), kept)
        found.append(kept if r is None else kept.new_zeros(N, K).index_copy_(0, r, kept))
    return found


def vector_grads(
    sums: Tensor, rows: Vectors, size: int, dtypes: Dtypes, by: Backend
) -> list[Tensor | None]:
    """Each bias's gradient of its own size: its part of ``sums`` at its rows, else zero.

    Args:
        sums: [R], for one bias after the other.
        rows: kept rows of each, or None.
        size: of each bias.
        dtypes: of each gradient; None where it is not wanted.
        by: who computes it.
    """
    if by.compact and any(r is not None for r in rows):
        made = kept_sums(sums, list(rows), size, _widest(dtypes), by.linears)
        return [db if k is None else db.to(k) for db, k in zip(made, dtypes)]
    found: list[Tensor | None] = []
    for part, r, dtype in zip(_split(sums, rows, size), rows, dtypes):
        if dtype is None:
            found.append(None)
            continue
        kept = part.to(dtype, copy=len(rows) > 1)  # not a view of its neighbours
        found.append(kept if r is None else kept.new_zeros(size).index_copy_(0, r, kept))
    return found


def _split(grad: Tensor, rows: Vectors, size: int) -> list[Tensor]:
    """The last dimension cut into what is kept of each; padding is left out."""
    counts = [size if r is None else r.shape[0] for r in rows]
    ends = list(accumulate(counts))
    return [grad[..., end - count : end] for count, end in zip(counts, ends)]


def _widest(dtypes: Dtypes) -> torch.dtype:
    return reduce(torch.promote_types, [k for k in dtypes if k is not None])


def wanted(dtypes: Dtypes, need: Sequence[bool]) -> Dtypes:
    """The dtypes of gradients that are wanted; None for the others."""
    return tuple(k if n else None for k, n in zip(dtypes, need))
