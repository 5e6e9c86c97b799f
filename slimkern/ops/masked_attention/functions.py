"""The two functions of masked attention that have gradients of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimkern.ops._masked import (
    Backend,
    Ending,
    Linear,
    kept_part,
    refuse_second_derivative,
    vector_grad,
    weight_grad,
)

_ops: Any = torch.ops.slimkern
Index = tuple[Tensor | None, Tensor | None, Tensor | None]


def _joined_weights(
    weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], rows: Index, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The kept rows of three weights one below the other, and of their biases."""
    weight = torch.cat([kept_part(w, r, None).to(dtype) for w, r in zip(weights, rows)])
    if all(b is None for b in biases):
        return weight, None
    parts = []
    for w, b, r in zip(weights, biases, rows):
        count = w.shape[0] if r is None else r.shape[0]
        if b is None:
            parts.append(w.new_zeros(count, dtype=dtype))
        else:
            parts.append((b if r is None else b.index_select(0, r)).to(dtype))
    return weight, torch.cat(parts)


class MaskedQkvFn(torch.autograd.Function):
    """Queries, keys and values of the kept heads by one product with x; one gives its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        wq: Tensor,
        bq: Tensor | None,
        wk: Tensor,
        bk: Tensor | None,
        wv: Tensor,
        bv: Tensor | None,
        rows: Index,
        head_dim: int,
        dtype: torch.dtype,
        out: torch.dtype,
        by: Backend,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, hidden] -> q, k, v [B, heads, T, d] of dtype ``out``, views of one tensor."""
        B, T, hidden = x.shape
        narrow = x.reshape(B * T, hidden).to(dtype)
        weight, bias = _joined_weights((wq, wk, wv), (bq, bk, bv), rows, dtype)
        y = Linear(weight, None, None).forward(narrow, bias, None, by)
        ctx.save_for_backward(narrow, weight, *rows)
        ctx.likes = tuple((w.shape, w.dtype) for w in (wq, wk, wv))
        ctx.biases = tuple(None if b is None else b.dtype for b in (bq, bk, bv))
        ctx.x, ctx.by = (x.shape, x.dtype), by
        heads = y.to(out).view(B, T, 3, -1, head_dim).permute(2, 0, 3, 1, 4)
        return heads[0], heads[1], heads[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of q, k, v -> dx and those of weights and biases.

        Raises:
            RuntimeError: under ``create_graph=True``.
        """
        refuse_second_derivative("masked_attention")
        x, weight, *rows = ctx.saved_tensors
        need, by = ctx.needs_input_grad, ctx.by
        (B, T, _), dtype = ctx.x
        width = weight.shape[0] // 3
        # Side by side again, in the dtype of the products: one pass over each.
        grad = x.new_empty(B, T, 3, width)
        for i, part in enumerate(grads):
            grad[:, :, i].view(B, T, part.shape[1], -1).copy_(part.transpose(1, 2))
        grad = grad.view(B * T, 3 * width)
        sums = None
        found: list[Tensor | None] = []
        for i in range(3):
            part, (N, _), dw, db = grad[:, i * width : (i + 1) * width], ctx.likes[i][0], None, None
            if need[1 + 2 * i]:
                dw = weight_grad(part, x, rows[i], None, ctx.likes[i], by)
            if need[2 + 2 * i]:
                if sums is None:
                    sums = _ops.indexed_linear_db.default(grad, None, 3 * width, by.linears)
                kept = sums[i * width : (i + 1) * width]
                db = vector_grad(kept.clone(), rows[i], N, ctx.biases[i])
            found += [dw, db]
        dx = None
        if need[0]:
            dx = Linear(weight, None, None).dx(grad, by).to(dtype).view(ctx.x[0])
        return dx, *found, *(None,) * 5


class MaskedOutputFn(torch.autograd.Function):
    """The output projection of the kept heads, and the end of the block."""

    @staticmethod
    def forward(
        ctx: Any,
        context: Tensor,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        seed: Tensor | None,
        cols: Tensor | None,
        dtype: torch.dtype,
        ending: Ending,
        by: Backend,
    ) -> Tensor:
        """context [M, kept], x [M, hidden] -> y [M, hidden]."""
        narrow, linear = context.to(dtype), Linear.of(w, None, cols, dtype)
        norm = None if gamma is None or beta is None else (gamma, beta)
        y, saved = ending.forward(linear.forward(narrow, b, None, by), x, seed, norm, by)
        ctx.save_for_backward(narrow, linear.weight, cols, gamma, *saved)
        ctx.like, ctx.indexed = (w.shape, w.dtype), linear.cols is not None
        ctx.bias = None if b is None else b.dtype
        ctx.norms = None if beta is None else beta.dtype
        ctx.context, ctx.ending, ctx.by = context.dtype, ending, by
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """dy [M, hidden] -> d_context, dx, dW, db, d_gamma, d_beta.

        Raises:
            RuntimeError: under ``create_graph=True``.
        """
        refuse_second_derivative("masked_attention")
        context, w, cols, gamma, *saved = ctx.saved_tensors
        need, by = ctx.needs_input_grad, ctx.by
        linear = Linear(w, None, cols if ctx.indexed else None)
        to_x, to_y, total, norms = ctx.ending.backward(grad, tuple(saved), gamma, context.dtype, by)
        d_context = linear.dx(to_y, by).to(ctx.context) if need[0] else None
        dw = weight_grad(to_y, context, None, cols, ctx.like, by) if need[2] else None
        db = vector_grad(total, None, 0, ctx.bias) if need[3] else None
        d_gamma = norms[0].to(gamma.dtype) if need[4] and norms is not None else None
        d_beta = norms[1].to(ctx.norms) if need[5] and norms is not None else None
        return d_context, to_x, dw, db, d_gamma, d_beta, *(None,) * 5
