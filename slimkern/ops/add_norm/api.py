"""The registered ops of LayerNorm over a sum with dropout; functions above have the gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkern.ops._registry import TRITON_DTYPES, Backends, define_op

BACKENDS = Backends(
    __package__,
    default={"cpu": "cpu", "cuda": "triton", "meta": "reference"},
    dtypes={"cpu": (torch.float32, torch.bfloat16), "triton": TRITON_DTYPES},
)


def _fake_fwd(
    x: Tensor,
    residual: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    seed: Tensor | None,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(residual.dtype, torch.float32)
    shape = residual.shape
    s, stats = residual.new_empty(shape, dtype=wide), residual.new_empty(shape[0], 3, dtype=wide)
    return residual.new_empty(shape), s, stats


def _fake_grad(
    grad: Tensor,
    s: Tensor,
    stats: Tensor,
    gamma: Tensor,
    narrow: bool,
    seed: Tensor | None,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    apart, dtype = narrow or seed is not None, torch.bfloat16 if narrow else grad.dtype
    dx = grad.new_empty(s.shape if apart else (0,), dtype=dtype)
    return grad.new_empty(s.shape), dx, s.new_empty(3, s.shape[1])


add_norm_fwd = define_op(
    "add_norm_fwd",
    "Tensor x, Tensor residual, Tensor gamma, Tensor beta, float eps, Tensor? seed, float p",
    _fake_fwd,
    BACKENDS,
    "(Tensor, Tensor, Tensor)",
)
add_norm_grad = define_op(
    "add_norm_grad",
    "Tensor grad, Tensor s, Tensor stats, Tensor gamma, bool narrow, Tensor? seed, float p",
    _fake_grad,
    BACKENDS,
    "(Tensor, Tensor, Tensor)",
)
