"""The equation in plain torch, from ordinary weights: the oracle of the kernel.

    y = post(x + fc2(a(fc1(pre(x)))))              or, gated,
    y = post(x + fc2(a(fc1(pre(x))) * up(pre(x))))

x and y [..., hidden]. LayerNorm and RMSNorm are those of Ba et al. (2016) and Zhang and Sennrich
(2019).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slimkern.ops._weights import FfnWeights, LinearWeights, NormWeights


def activation(name: str, x: Tensor) -> Tensor:
    """a(x), elementwise.

    Raises:
        KeyError: an unknown name.
    """
    return {
        "none": lambda: x,
        "relu": lambda: F.relu(x),
        "squared_relu": lambda: F.relu(x).square(),
        "gelu": lambda: F.gelu(x),
        "gelu_tanh": lambda: F.gelu(x, approximate="tanh"),
        "quick_gelu": lambda: x * torch.sigmoid(1.702 * x),
        "silu": lambda: F.silu(x),
    }[name]()


def norm(weights: NormWeights | None, x: Tensor) -> Tensor:
    """The norm of the last dimension; x itself without one."""
    if weights is None:
        return x
    size = x.shape[-1:]
    if weights.kind == "layer":
        return F.layer_norm(x, size, weights.weight, weights.bias, weights.eps)
    y = F.rms_norm(x, size, weights.weight, weights.eps)
    return y if weights.bias is None else y + weights.bias


def linear(weights: LinearWeights, x: Tensor) -> Tensor:
    """x @ Wᵀ + b."""
    return F.linear(x, weights.weight, weights.bias)


def ffn(x: Tensor, weights: FfnWeights) -> Tensor:
    """x [..., hidden] -> y [..., hidden]."""
    pre = norm(weights.pre, x)
    mid = activation(weights.activation, linear(weights.fc1, pre))
    if weights.up is not None:
        mid = mid * linear(weights.up, pre)
    y = linear(weights.fc2, mid)
    return norm(weights.post, x + y if weights.residual else y)
