"""``indexed_linear``: validation, the choice of a backend, and gradients."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from slimkern.ops._linear import autocast_linear, check_device, check_linear
from slimkern.ops._plain import FAST
from slimkern.ops._registry import TRITON_DTYPES, Backends, define_op

BACKENDS = Backends(
    __package__,
    default={"cpu": "reference", "cuda": "triton", "meta": "reference"},
    fast=FAST,
    units="products",
    dtypes={"triton": TRITON_DTYPES},
)


def _fake_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, cols: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] if rows is None else rows.shape[0])


def _fake_dx(grad_y: Tensor, weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    return grad_y.new_empty(grad_y.shape[0], weight.shape[1] if cols is None else cols.shape[0])


def _fake_dw(
    grad_y: Tensor, x: Tensor, rows: Tensor | None, cols: Tensor | None, N: int, K: int
) -> Tensor:
    return x.new_empty(N, K)


def _fake_db(grad_y: Tensor, rows: Tensor | None, N: int) -> Tensor:
    return grad_y.new_empty(N)


_fwd = define_op(
    "indexed_linear_fwd",
    "Tensor x, Tensor weight, Tensor? bias, Tensor? rows, Tensor? cols",
    _fake_fwd,
    BACKENDS,
)
_dx = define_op(
    "indexed_linear_dx",
    "Tensor grad_y, Tensor weight, Tensor? rows, Tensor? cols",
    _fake_dx,
    BACKENDS,
)
linear_dw = define_op(
    "indexed_linear_dw",
    "Tensor grad_y, Tensor x, Tensor? rows, Tensor? cols, SymInt N, SymInt K",
    _fake_dw,
    BACKENDS,
)
linear_db = define_op(
    "indexed_linear_db", "Tensor grad_y, Tensor? rows, SymInt N", _fake_db, BACKENDS
)


class IndexedLinearFn(torch.autograd.Function):
    """Gradients land in the kept rows and columns of full-size tensors; the rest is zero."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor | None,
        cols: Tensor | None,
        backend: str,
    ) -> Tensor:
        """x [M, C] -> y [M, R]; saves only what the gradients asked for need."""
        need_x, need_weight, _ = ctx.needs_input_grad[:3]
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None, rows, cols)
        ctx.shape = weight.shape
        ctx.backend = backend
        return _fwd(x, weight, bias, rows, cols, backend)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """dy [M, R] -> dx [M, C], dW [N, K], db [N].

        Raises:
            RuntimeError: under ``create_graph=True``; the gradients are no function of x and weight
                for autograd, and a gradient penalty would silently miss its part.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "indexed_linear is differentiable once; create_graph is True, accepted: False"
            )
        x, weight, rows, cols = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        N, K = ctx.shape
        backend = ctx.backend
        dx = _dx(grad_y, weight, rows, cols, backend) if need_x else None
        dw = linear_dw(grad_y, x, rows, cols, N, K, backend) if need_weight else None
        db = linear_db(grad_y, rows, N, backend) if need_bias else None
        return dx, dw, db, None, None, None


def indexed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """``y = x @ W[rows][:, cols]ᵀ + b[rows]``: a linear layer of which only a part is computed.

    With R kept rows (all N where ``rows`` is None) and C kept columns (all K where ``cols`` is
    None). Differentiable once in x, weight and bias: the gradients of weight and bias have their
    full size and are zero outside the kept rows and columns. Under ``torch.autocast`` it behaves
    like ``torch.nn.functional.linear``: it computes in autocast's dtype, and gradients come back
    in the dtype of the parameters.

    The *values* of ``rows`` and ``cols`` are not checked here, because that would stop a GPU on
    every call: `check_index` does it, once, where masks are set. An index as long as its dimension
    is taken for "all"; another one that is not sorted, unique and in range makes backend ``cpu``
    raise `IndexError`, and is undefined on the others.

    Args:
        x: [..., C].
        weight: [N, K].
        bias: [N], or None.
        rows: kept rows of weight, int64 [R], sorted, unique; or None.
        cols: kept columns of weight, int64 [C], sorted, unique; or None.
        backend: ``reference``, ``cpu``, ``triton``, or None for the default of the device and
            dtype: on CPUs ``cpu`` for float32 and bfloat16, else ``reference``.

    Returns:
        [..., R], in the dtype of x.

    Raises:
        ValueError: a shape, a device or the backend does not fit.
        TypeError: a dtype does not fit.
    """
    x, weight, bias = autocast_linear(x, weight, bias)
    name = BACKENDS.choose(backend, x.device, x.dtype)
    _check(x, weight, bias, rows, cols)
    if rows is not None and rows.shape[0] == weight.shape[0]:
        rows = None
    if cols is not None and cols.shape[0] == weight.shape[1]:
        cols = None

    leading = x.shape[:-1]
    folded = x if x.dim() == 2 else x.reshape(prod(leading), x.shape[-1])
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        y = IndexedLinearFn.apply(folded, weight, bias, rows, cols, name)
    else:
        y = _fwd(folded, weight, bias, rows, cols, name)
    return y if x.dim() == 2 else y.reshape(*leading, y.shape[-1])


def check_index(index: Tensor, size: int, name: str) -> Tensor:
    """Validates the values of an index vector, and returns it.

    Waits for the device: call it where masks are set, not on each forward.

    Args:
        index: int64 [n].
        size: the size of the dimension that is indexed.
        name: the argument's name, for the message.

    Raises:
        TypeError: not int64.
        ValueError: not a vector, or not strictly increasing, or outside [0, size).
    """
    _check_vector(index, name)
    if index.numel() == 0:
        return index
    low, high = int(index[0]), int(index[-1])
    rising = bool((index[1:] > index[:-1]).all())
    if not rising:
        raise ValueError(f"{name} is not sorted and unique; accepted: strictly increasing indices")
    if low < 0 or high >= size:
        raise ValueError(f"{name} spans {low} to {high}; accepted: 0 to {size - 1}")
    return index


def _check_vector(index: Tensor, name: str) -> None:
    if index.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {index.dtype}; accepted: torch.int64")
    if index.dim() != 1:
        raise ValueError(f"{name} has shape {tuple(index.shape)}; accepted: one dimension")


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, cols: Tensor | None
) -> None:
    """Shapes, dtypes and devices; nothing that would wait for a device."""
    check_linear(x, weight, bias)
    N, K = weight.shape
    for name, index, size in (("rows", rows, N), ("cols", cols, K)):
        if index is None:
            continue
        _check_vector(index, name)
        if index.shape[0] > size:
            raise ValueError(f"{name} has {index.shape[0]} entries; accepted: at most {size}")
    kept = K if cols is None else cols.shape[0]
    if x.shape[-1] != kept:
        what = "weight has columns" if cols is None else "cols has entries"
        raise ValueError(
            f"x has shape {tuple(x.shape)}; accepted: a last dimension of {kept}, as many as {what}"
        )
    for name, tensor in (("rows", rows), ("cols", cols)):
        if tensor is not None:
            check_device(name, tensor, x)
