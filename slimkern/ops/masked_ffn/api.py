"""``masked_ffn``: validation, and its gradients above the registered ops of its parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimkern.ops._masked import Ending, autocast_dtype, refuse_second_derivative
from slimkern.ops._masked_checks import check_block, check_ending, check_kept, check_linear
from slimkern.ops._masked_linears import (
    Backend,
    joined_linear,
    saved_linear,
    vector_grads,
    weight_grads,
)
from slimkern.ops._weights import FfnWeights
from slimkern.ops.activation import activation_grad
from slimkern.ops.activation.api import ACTIVATIONS
from slimkern.ops.kept_linear.api import MULTIPLE
from slimkern.ops.seeded_dropout import draw_seed


class MaskedFfnFn(torch.autograd.Function):
    """Saves the pre-activation of the kept channels; the backward computes the activation anew."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        seed: Tensor | None,
        keep: Tensor | None,
        activation: str,
        dtype: torch.dtype,
        ending: Ending,
        by: Backend,
    ) -> Tensor:
        """x [M, hidden] -> y [M, hidden]."""
        narrow = x.to(dtype)
        first = joined_linear((w1,), (b1,), (keep,), None, dtype, by, MULTIPLE)
        second = joined_linear((w2,), (b2,), (None,), keep, dtype, by, MULTIPLE)
        a, h = first.activated(narrow, activation)
        norm = None if gamma is None or beta is None else (gamma, beta)
        y, saved = ending.forward(second.forward(a), x, seed, norm, by)
        ctx.save_for_backward(narrow, h, first.weight, second.weight, keep, gamma, *saved)
        ctx.first, ctx.second = (w1.shape, (w1.dtype,)), (w2.shape, (w2.dtype,))
        ctx.b1 = None if b1 is None else b1.dtype
        ctx.b2 = None if b2 is None else b2.dtype
        ctx.norms = None if beta is None else beta.dtype
        ctx.indexed = (first.rows is not None, second.cols is not None)
        ctx.activation, ctx.ending, ctx.by = activation, ending, by
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """dy [M, hidden] -> dx, dW1, db1, dW2, db2, d_gamma, d_beta.

        Raises:
            RuntimeError: under ``create_graph=True``.
        """
        refuse_second_derivative("masked_ffn")
        x, h, w1, w2, keep, gamma, *saved = ctx.saved_tensors
        need, by = ctx.needs_input_grad, ctx.by
        first = saved_linear(w1, keep, None, ctx.indexed[0], by)
        second = saved_linear(w2, None, keep, ctx.indexed[1], by)
        to_x, to_y, total, norms = ctx.ending.backward(grad, tuple(saved), gamma, x.dtype, by)
        dx = dw1 = db1 = dw2 = db2 = None
        if need[4]:
            db2 = total.to(ctx.b2)
        if any(need[:4]):
            dh, a, sums = activation_grad(second.dx(to_y), h, ctx.activation, by.rows)
            if need[1]:
                shape, dtypes = ctx.first
                (dw1,) = weight_grads(dh, x, (keep,), None, shape, dtypes, by)
            if need[2]:
                (db1,) = vector_grads(sums, (keep,), ctx.first[0][0], (ctx.b1,), by)
            if need[3]:
                shape, dtypes = ctx.second
                (dw2,) = weight_grads(to_y, a, (None,), keep, shape, dtypes, by)
            if need[0]:
                dx = first.dx_onto(dh, to_x, grad.dtype)
        d_gamma = norms[0].to(gamma.dtype) if need[5] else None
        d_beta = norms[1].to(ctx.norms) if need[6] else None
        return dx, dw1, db1, dw2, db2, d_gamma, d_beta, *(None,) * 6


def masked_ffn(
    x: Tensor,
    weights: FfnWeights,
    keep: Tensor | None = None,
    *,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """``y = post(x + drop(fc2[:, keep](a(fc1[keep](x)))))``: an FFN of which a part is computed.

    What lies between the two linears exists for the kept channels only. Of it the backward gets
    the pre-activation, and computes the activation anew: of N channels with R kept, R numbers per
    token are saved where plain torch saves 2 N. Differentiable once in x and every
    weight; gradients have the weights' full sizes and are zero outside the kept channels.

    Under ``torch.autocast`` the products are computed in its dtype, and what is saved between the
    linears has that dtype; the sum with x, and its norm, stay in the dtype of x.

    Args:
        x: [..., hidden].
        weights: of full size; ``up`` and ``pre`` are not known here, and ``post`` is a LayerNorm
            over the sum, so that it needs the residual.
        keep: kept channels, int64, sorted, unique; or None for all. Values are not checked here.
        dropout: the probability with which an output of fc2 is zeroed, from torch's generator.
        backend: of the linears, ``reference``, ``cpu``, ``triton``; None: the device's default.

    Returns:
        [..., hidden] in the dtype of x; without residual in that of the products.

    Raises:
        ValueError: a shape, a device, the activation, dropout or the backend does not fit.
        TypeError: a dtype does not fit.
    """
    _check(x, weights, keep, dropout)
    if keep is not None and keep.shape[0] == weights.fc1.weight.shape[0]:
        keep = None
    dtype = autocast_dtype(x)
    post = weights.post
    ending = Ending(weights.residual, None if post is None else post.eps, dropout)
    folded = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    fc1, fc2 = weights.fc1, weights.fc2
    y: Tensor = MaskedFfnFn.apply(
        folded, fc1.weight, fc1.bias, fc2.weight, fc2.bias,
        None if post is None else post.weight, None if post is None else post.bias,
        draw_seed(x.device) if dropout else None, keep, weights.activation, dtype, ending,
        Backend.choose(backend, folded, dtype),
    )  # fmt: skip
    return y if x.dim() == 2 else y.reshape(x.shape)


def _check(x: Tensor, weights: FfnWeights, keep: Tensor | None, dropout: float) -> None:
    """Shapes, dtypes and devices; nothing that would wait for a device."""
    if weights.up is not None or weights.pre is not None:
        raise ValueError("weights has up or pre; accepted: neither, an FFN of two linears")
    if weights.activation not in ACTIVATIONS:
        raise ValueError(
            f"activation is {weights.activation!r}; accepted: {', '.join(ACTIVATIONS)}"
        )
    hidden = check_block(x, dropout)
    channels = weights.fc1.weight.shape[0]
    check_linear("fc1", weights.fc1, (channels, hidden), x)
    check_linear("fc2", weights.fc2, (hidden, channels), x)
    check_kept("keep", keep, channels, x)
    check_ending(weights.post, weights.residual, hidden, x)
