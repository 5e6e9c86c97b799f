"""The equation in plain torch, for any device and floating dtype; the oracle of the kernels.

    y = a(x);    dx = grad * a'(x), with y and the sum of dx over rows beside it

Derivatives are torch's own where it has them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _value(name: str, x: Tensor) -> Tensor:
    if name == "relu":
        return F.relu(x)
    if name == "squared_relu":
        return F.relu(x).square()
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    if name == "silu":
        return F.silu(x)
    if name == "none":
        return x.clone()
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def activation_fwd(x: Tensor, activation: str) -> Tensor:
    """a(x), [M, N]."""
    return _value(activation, x).contiguous()


def _slope(name: str, grad: Tensor, x: Tensor) -> Tensor:
    if name == "relu":
        return grad * (x > 0)
    if name == "squared_relu":
        return grad * 2 * F.relu(x)
    if name == "quick_gelu":
        s = torch.sigmoid(1.702 * x)
        return grad * s * (1 + 1.702 * x * (1 - s))
    if name == "silu":
        return torch.ops.aten.silu_backward(grad, x)
    if name == "none":
        return grad.clone()
    return torch.ops.aten.gelu_backward(
        grad, x, approximate="tanh" if name == "gelu_tanh" else "none"
    )


def activation_grad(grad: Tensor, x: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """grad, x [M, N] -> dx [M, N], a(x) [M, N], the sum of dx over rows [N].

    The sum is float32, or float64 where x is.
    """
    dx = _slope(activation, grad, x)
    wide = torch.promote_types(x.dtype, torch.float32)
    return dx.contiguous(), _value(activation, x).contiguous(), dx.sum(0, dtype=wide)
