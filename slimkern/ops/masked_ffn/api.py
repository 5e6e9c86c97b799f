"""``masked_ffn``: validation, and its gradients above the registered ops of its parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimkern.ops._masked import (
    Backend,
    Ending,
    Linear,
    autocast_dtype,
    refuse_second_derivative,
    vector_grad,
    weight_grad,
)
from slimkern.ops._masked_checks import check_block, check_ending, check_kept, check_linear
from slimkern.ops._weights import FfnWeights
from slimkern.ops.activation import activation_fwd, activation_grad
from slimkern.ops.activation.api import ACTIVATIONS
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
        first, second = Linear.of(w1, keep, None, dtype), Linear.of(w2, None, keep, dtype)
        h = first.forward(narrow, b1, keep, by)
        a = activation_fwd(h, activation, by.rows)
        norm = None if gamma is None or beta is None else (gamma, beta)
        y, saved = ending.forward(second.forward(a, b2, None, by), x, seed, norm, by)
        ctx.save_for_backward(narrow, h, first.weight, second.weight, keep, gamma, *saved)
        ctx.first, ctx.second = (w1.shape, w1.dtype), (w2.shape, w2.dtype)
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
        first = Linear(w1, keep if ctx.indexed[0] else None, None)
        second = Linear(w2, None, keep if ctx.indexed[1] else None)
        need, by = ctx.needs_input_grad, ctx.by
        to_x, to_y, total, norms = ctx.ending.backward(grad, tuple(saved), gamma, x.dtype, by)
        dx = dw1 = db1 = dw2 = db2 = None
        if need[4]:
            db2 = vector_grad(total, None, 0, ctx.b2)
        if any(need[:4]):
            dh, a, sums = activation_grad(second.dx(to_y, by), h, ctx.activation, by.rows)
            if need[1]:
                dw1 = weight_grad(dh, x, keep, None, ctx.first, by)
            if need[2]:
                db1 = vector_grad(sums, keep, ctx.first[0][0], ctx.b1)
            if need[3]:
                dw2 = weight_grad(to_y, a, None, keep, ctx.second, by)
            if need[0]:
                dx = _joined(first.dx(dh, by), to_x, grad.dtype)
        d_gamma = norms[0].to(gamma.dtype) if need[5] else None
        d_beta = norms[1].to(ctx.norms) if need[6] else None
        return dx, dw1, db1, dw2, db2, d_gamma, d_beta, *(None,) * 6


def _joined(dx: Tensor, to_x: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gradient of x through the block, and that through the residual."""
    if to_x is None:
        return dx.to(dtype)
    return dx.add_(to_x) if dx.dtype == dtype else to_x + dx


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
