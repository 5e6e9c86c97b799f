"""The end of a masked block, and what else all of them share.

post(x + drop(y))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slimkern.ops._masked_linears import Backend
from slimkern.ops.add_norm import add_norm_fwd, add_norm_grad
from slimkern.ops.seeded_dropout import seeded_dropout

Saved = tuple[Tensor | None, ...]


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What a block computes its products in: autocast's dtype where it is on, else x's own."""
    if x.device.type == "meta" or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(x.device.type)


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
