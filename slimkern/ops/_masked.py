"""What masked blocks are put together from: gathered linears, and the end of a block.

Weights have their full size, and so have their gradients, which are zero outside the kept part.
Under autocast a weight is gathered first and then narrowed, so that what is cast is the kept part
alone; the gradient is widened where it is scattered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimkern.ops.activation.api import BACKENDS as ROWS
from slimkern.ops.add_norm import add_norm_fwd, add_norm_grad
from slimkern.ops.indexed_linear.api import BACKENDS as LINEARS
from slimkern.ops.seeded_dropout import seeded_dropout

_ops: Any = torch.ops.slimkern
Saved = tuple[Tensor | None, ...]


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
        kernels = {x.dtype, dtype} <= {torch.float32, torch.bfloat16}
        return cls(
            LINEARS.choose(backend, x.device, dtype),
            ROWS.choose(None if kernels and backend != "reference" else "reference", x.device),
        )


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What a block computes its products in: autocast's dtype where it is on, else x's own."""
    if x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(x.device.type)


@dataclass(frozen=True)
class Linear:
    """A linear as the ops take it.

    Attributes:
        weight: full size with its index, or the kept part in autocast's dtype without one.
        rows, cols: the index, or None.
    """

    weight: Tensor
    rows: Tensor | None
    cols: Tensor | None

    @classmethod
    def of(
        cls, weight: Tensor, rows: Tensor | None, cols: Tensor | None, dtype: torch.dtype
    ) -> Linear:
        """The linear for inputs of ``dtype``."""
        if weight.dtype == dtype:
            return cls(weight, rows, cols)
        return cls(kept_part(weight, rows, cols).to(dtype), None, None)

    def forward(self, x: Tensor, bias: Tensor | None, rows: Tensor | None, by: Backend) -> Tensor:
        """x [M, C] -> [M, R]; ``bias`` is full size in any dtype, and ``rows`` what is kept."""
        if bias is not None:
            if self.rows is None and rows is not None:
                bias = bias.index_select(0, rows)
            bias = bias.to(x.dtype)
        y: Tensor = _ops.indexed_linear_fwd.default(
            x, self.weight, bias, self.rows, self.cols, by.linears
        )
        return y

    def dx(self, grad: Tensor, by: Backend) -> Tensor:
        """dy [M, R] -> dx [M, C]."""
        dx: Tensor = _ops.indexed_linear_dx.default(
            grad, self.weight, self.rows, self.cols, by.linears
        )
        return dx


def kept_part(weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """W[rows][:, cols]; the weight itself where both are None."""
    if rows is not None:
        weight = weight.index_select(0, rows)
    return weight if cols is None else weight.index_select(1, cols)


def weight_grad(
    grad: Tensor,
    x: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    like: tuple[torch.Size, torch.dtype],
    by: Backend,
) -> Tensor:
    """dW of the weight's own size and dtype: (dyᵀ x) at the kept rows and columns, else zero."""
    (N, K), dtype = like
    if x.dtype == dtype:
        dw: Tensor = _ops.indexed_linear_dw.default(grad, x, rows, cols, N, K, by.linears)
        return dw
    kept: Tensor = _ops.indexed_linear_dw.default(
        grad, x, None, None, grad.shape[1], x.shape[1], by.linears
    )
    kept = kept.to(dtype)
    if cols is not None:
        wide = kept.new_zeros(kept.shape[0], K)
        kept = wide.scatter_(1, cols.expand(kept.shape[0], -1), kept)
    if rows is not None:
        kept = kept.new_zeros(N, K).index_copy_(0, rows, kept)
    return kept


def vector_grad(kept: Tensor, rows: Tensor | None, size: int, dtype: torch.dtype) -> Tensor:
    """A bias's gradient of its own size and dtype: ``kept`` at ``rows``, else zero."""
    kept = kept.to(dtype)
    return kept if rows is None else kept.new_zeros(size).index_copy_(0, rows, kept)


def column_sums(x: Tensor) -> Tensor:
    """The sum over rows, [N], in float32 at least."""
    return x.sum(0, dtype=torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class Ending:
    """How a block ends: ``post(x + drop(y))``, each part where it is there.

    Attributes:
        residual: x is added.
        eps: of the LayerNorm; None where there is none (one needs the residual).
        dropout: the probability with which an element of y is zeroed, by a seed.
    """

    residual: bool = False
    eps: float | None = None
    dropout: float = 0.0

    def forward(
        self,
        y: Tensor,
        x: Tensor,
        seed: Tensor | None,
        norm: tuple[Tensor, Tensor] | None,
        by: Backend,
    ) -> tuple[Tensor, Saved]:
        """y, x [M, N] -> the result in x's dtype (y's without residual), what to save."""
        if norm is not None and self.eps is not None:
            out, s, stats = add_norm_fwd(y, x, *norm, self.eps, seed, self.dropout, by.rows)
            return out, (s, stats, seed)
        if seed is not None:
            y = seeded_dropout(y, seed, self.dropout, by.rows)
        return (x + y if self.residual else y), (None, None, seed)

    def backward(
        self, grad: Tensor, saved: Saved, gamma: Tensor | None, dtype: torch.dtype, by: Backend
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        """-> d_x (None without residual), d_y in ``dtype``, its sum over rows, and those of gamma
        and beta [2, N] (None without a norm)."""
        s, stats, seed = saved
        if s is not None and stats is not None and gamma is not None:
            narrow = dtype == torch.bfloat16 and grad.dtype != dtype
            to_x, apart, sums = add_norm_grad(
                grad, s, stats, gamma, narrow, seed, self.dropout, by.rows
            )
            to_y = apart if narrow or seed is not None else to_x
            return to_x, to_y.to(dtype), sums[2], sums[:2]
        to_y = grad.to(dtype)
        if seed is not None:
            to_y = seeded_dropout(to_y, seed, self.dropout, by.rows)
        return (grad if self.residual else None), to_y, column_sums(to_y), None


def refuse_second_derivative(name: str) -> None:
    """Raises RuntimeError under ``create_graph=True``: gradients here are no function of the
    inputs for autograd, and a gradient penalty would silently miss its part."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} is differentiable once; create_graph is True, accepted: False")
