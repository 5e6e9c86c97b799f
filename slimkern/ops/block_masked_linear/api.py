"""``block_masked_linear``: validation, the choice of a backend, and gradients."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from slimkern.ops._block_mask import BlockMask
from slimkern.ops._linear import autocast_linear, check_device, check_linear
from slimkern.ops._plain import FAST
from slimkern.ops._registry import Backends, define_op
from slimkern.ops.indexed_linear.api import linear_db, linear_dw

BACKENDS = Backends(
    __package__,
    default={"cpu": "reference", "cuda": "triton", "meta": "reference"},
    # Triton has no float64, which serves checks.
    fast={**FAST, ("cuda", torch.float64): "reference"},
    units="products",
)


def _fake_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, bits: Tensor, bn: int, bk: int
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_dx(grad_y: Tensor, weight: Tensor, bits: Tensor, bn: int, bk: int) -> Tensor:
    return grad_y.new_empty(grad_y.shape[0], weight.shape[1])


def _fake_dw(grad_y: Tensor, x: Tensor, bits: Tensor, bn: int, bk: int, N: int, K: int) -> Tensor:
    return x.new_empty(N, K)


_fwd = define_op(
    "block_masked_linear_fwd",
    "Tensor x, Tensor weight, Tensor? bias, Tensor bits, SymInt bn, SymInt bk",
    _fake_fwd,
    BACKENDS,
)
_dx = define_op(
    "block_masked_linear_dx",
    "Tensor grad_y, Tensor weight, Tensor bits, SymInt bn, SymInt bk",
    _fake_dx,
    BACKENDS,
)
_dw = define_op(
    "block_masked_linear_dw",
    "Tensor grad_y, Tensor x, Tensor bits, SymInt bn, SymInt bk, SymInt N, SymInt K",
    _fake_dw,
    BACKENDS,
)


class BlockMaskedLinearFn(torch.autograd.Function):
    """Gradients of the weight are zero outside the kept blocks, or dense where asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        bits: Tensor,
        block: tuple[int, int],
        dense_gradient: bool,
        backend: str,
    ) -> Tensor:
        """x [M, K] -> y [M, N]; saves only what the gradients asked for need."""
        need_x, need_weight, _ = ctx.needs_input_grad[:3]
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None, bits)
        ctx.shape = weight.shape
        ctx.block = block
        ctx.dense_gradient = dense_gradient
        ctx.backend = backend
        return _fwd(x, weight, bias, bits, *block, backend)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """dy [M, N] -> dx [M, K], dW [N, K], db [N].

        Raises:
            RuntimeError: under ``create_graph=True``; the gradients are no function of x and weight
                for autograd, and a gradient penalty would silently miss its part.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "block_masked_linear is differentiable once; create_graph is True, accepted: False"
            )
        x, weight, bits = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        backend = ctx.backend
        N, K = ctx.shape
        dx = _dx(grad_y, weight, bits, *ctx.block, backend) if need_x else None
        dw = None
        if need_weight and ctx.dense_gradient:
            dw = linear_dw(grad_y, x, None, None, N, K, backend)
        elif need_weight:
            dw = _dw(grad_y, x, bits, *ctx.block, N, K, backend)
        db = linear_db(grad_y, None, N, backend) if need_bias else None
        return dx, dw, db, None, None, None, None


def block_masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: BlockMask,
    *,
    dense_gradient: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``y = x @ (W ∘ mask)ᵀ + b``: a linear layer whose weight is masked block by block.

    The mask is never expanded to numbers: what it removes takes no part, so that not even a NaN
    there reaches the result. Differentiable once in x, weight and bias; the gradient of the weight
    is zero where it is masked, unless it is asked for everywhere, by criteria that let weights grow
    back. Under ``torch.autocast`` it behaves like ``torch.nn.functional.linear``: it computes in
    autocast's dtype, and gradients come back in the dtype of the parameters.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N], or None.
        mask: of the weight's shape, on its device.
        dense_gradient: the gradient of the weight is dyᵀ x everywhere.
        backend: ``reference``, ``cpu``, ``triton``, or None for the default of the device and
            dtype: on CPUs ``cpu`` for float32 and bfloat16, on CUDA ``triton`` for these and
            float16, else ``reference``.

    Returns:
        [..., N], in the dtype of x.

    Raises:
        ValueError: a shape, a device or the backend does not fit.
        TypeError: a dtype does not fit, or the mask is no BlockMask.
    """
    x, weight, bias = autocast_linear(x, weight, bias)
    name = BACKENDS.choose(backend, x.device, x.dtype)
    _check(x, weight, bias, mask)
    leading = x.shape[:-1]
    folded = x if x.dim() == 2 else x.reshape(prod(leading), x.shape[-1])
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        y = BlockMaskedLinearFn.apply(
            folded, weight, bias, mask.bits, mask.block, dense_gradient, name
        )
    else:
        y = _fwd(folded, weight, bias, mask.bits, *mask.block, name)
    return y if x.dim() == 2 else y.reshape(*leading, y.shape[-1])


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, mask: BlockMask) -> None:
    """Shapes, dtypes and devices."""
    check_linear(x, weight, bias)
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; accepted: a last dimension of {weight.shape[1]}, as "
            "many as weight has columns"
        )
    if not isinstance(mask, BlockMask):
        raise TypeError(f"mask is {type(mask).__name__}; accepted: slimkern.ops.BlockMask")
    if tuple(mask.shape) != tuple(weight.shape):
        raise ValueError(
            f"mask is for a weight of shape {tuple(mask.shape)}; accepted: {tuple(weight.shape)}"
        )
    check_device("mask", mask.bits, x)
