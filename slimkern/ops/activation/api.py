"""The registered ops of an activation; the functions above have their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkern.ops._registry import TRITON_DTYPES, Backends, define_op

BACKENDS = Backends(
    __package__,
    default={"cpu": "cpu", "cuda": "triton", "meta": "reference"},
    dtypes={"cpu": (torch.float32, torch.bfloat16), "triton": TRITON_DTYPES},
)
ACTIVATIONS = ("none", "relu", "squared_relu", "gelu", "gelu_tanh", "quick_gelu", "silu")


def _fake_fwd(x: Tensor, activation: str) -> Tensor:
    return x.new_empty(x.shape)


def _fake_grad(grad: Tensor, x: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[1], dtype=wide)


activation_fwd = define_op("activation_fwd", "Tensor x, str activation", _fake_fwd, BACKENDS)
activation_grad = define_op(
    "activation_grad",
    "Tensor grad, Tensor x, str activation",
    _fake_grad,
    BACKENDS,
    "(Tensor, Tensor, Tensor)",
)
