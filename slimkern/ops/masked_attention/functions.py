"""The two functions of masked attention that have gradients of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimkern.ops._masked import Ending, refuse_second_derivative
from slimkern.ops._masked_linears import (
    Backend,
    joined_linear,
    saved_linear,
    vector_grads,
    wanted,
    weight_grads,
)
from slimkern.ops.kept_linear import joined_heads

_ops: Any = torch.ops.slimkern
Index = tuple[Tensor | None, Tensor | None, Tensor | None]


def _side_by_side(
    grads: tuple[Tensor, ...], dtype: torch.dtype, by: Backend
) -> tuple[Tensor, Tensor]:
    """Gradients [B, heads, T, d] -> [B T, 3 heads d] in the products' dtype, and its sums."""
    if by.compact:
        side, sums = joined_heads(list(grads), dtype, by.linears)
        return side, sums
    B, heads, T, d = grads[0].shape
    grad = grads[0].new_empty((B, T, 3, heads * d), dtype=dtype)
    for i, part in enumerate(grads):
        grad[:, :, i].view(B, T, heads, d).copy_(part.transpose(1, 2))
    grad = grad.view(B * T, 3 * heads * d)
    return grad, _ops.indexed_linear_db.default(grad, None, grad.shape[1], by.linears)


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
        linear = joined_linear((wq, wk, wv), (bq, bk, bv), rows, None, dtype, by)
        y = linear.forward(narrow)
        ctx.save_for_backward(narrow, linear.weight, *rows)
        ctx.shape, ctx.weights = wq.shape, (wq.dtype, wk.dtype, wv.dtype)
        ctx.biases = tuple(None if b is None else b.dtype for b in (bq, bk, bv))
        ctx.x, ctx.by = (x.shape, x.dtype), by
        count = y.shape[1] // (3 * head_dim)
        heads = y.to(out).view(B, T, 3, count, head_dim).permute(2, 0, 3, 1, 4)
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
        grad, sums = _side_by_side(grads, x.dtype, by)
        dws: list[Tensor | None] = [None] * 3
        dbs: list[Tensor | None] = [None] * 3
        weights, biases = wanted(ctx.weights, need[1:7:2]), wanted(ctx.biases, need[2:7:2])
        if any(weights):
            dws = weight_grads(grad, x, tuple(rows), None, ctx.shape, weights, by)
        if any(biases):
            dbs = vector_grads(sums, tuple(rows), ctx.shape[0], biases, by)
        found = [part for pair in zip(dws, dbs) for part in pair]
        dx = None
        if need[0]:
            shape, dtype = ctx.x
            dx = saved_linear(weight, None, None, False, by).dx_onto(grad, None, dtype).view(shape)
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
        narrow, linear = context.to(dtype), joined_linear((w,), (b,), (None,), cols, dtype, by)
        norm = None if gamma is None or beta is None else (gamma, beta)
        y, saved = ending.forward(linear.forward(narrow), x, seed, norm, by)
        ctx.save_for_backward(narrow, linear.weight, cols, gamma, *saved)
        ctx.like, ctx.indexed = (w.shape, (w.dtype,)), linear.cols is not None
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
        linear = saved_linear(w, None, cols, ctx.indexed, by)
        to_x, to_y, total, norms = ctx.ending.backward(grad, tuple(saved), gamma, context.dtype, by)
        d_context = linear.dx_onto(to_y, None, ctx.context) if need[0] else None
        shape, dtypes = ctx.like
        dw = weight_grads(to_y, context, (None,), cols, shape, dtypes, by)[0] if need[2] else None
        db = total.to(ctx.bias) if need[3] else None
        d_gamma = norms[0].to(gamma.dtype) if need[4] and norms is not None else None
        d_beta = norms[1].to(ctx.norms) if need[5] and norms is not None else None
        return d_context, to_x, dw, db, d_gamma, d_beta, *(None,) * 5
