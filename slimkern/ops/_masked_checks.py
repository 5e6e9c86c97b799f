"""What masked blocks refuse: shapes, dtypes and devices; nothing that would wait for a device."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkern.ops._weights import LinearWeights, NormWeights


def check_block(x: Tensor, dropout: float) -> int:
    """The hidden size of ``x`` [..., hidden].

    Raises:
        TypeError: x is not floating.
        ValueError: x has no dimension, or dropout is no probability.
    """
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; accepted: a floating dtype")
    if x.dim() < 1:
        raise ValueError("x has no dimension; accepted: [..., hidden]")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout is {dropout}; accepted: 0 to 1")
    return x.shape[-1]


def check_linear(name: str, linear: LinearWeights, shape: tuple[int, int], x: Tensor) -> None:
    """Raises ValueError or TypeError where a linear's weight or bias does not fit."""
    if linear.weight.dim() != 2 or tuple(linear.weight.shape) != shape:
        found = tuple(linear.weight.shape)
        raise ValueError(f"{name}.weight has shape {found}; accepted: {list(shape)}")
    if linear.bias is not None and tuple(linear.bias.shape) != shape[:1]:
        found = tuple(linear.bias.shape)
        raise ValueError(f"{name}.bias has shape {found}; accepted: [{shape[0]}]")
    for part, tensor in (("weight", linear.weight), ("bias", linear.bias)):
        if tensor is not None:
            _check_place(f"{name}.{part}", tensor, x)


def check_kept(name: str, index: Tensor | None, size: int, x: Tensor) -> None:
    """Raises ValueError or TypeError where an index is none of a dimension of ``size``."""
    if index is None:
        return
    if index.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {index.dtype}; accepted: torch.int64")
    if index.dim() != 1 or index.shape[0] > size:
        raise ValueError(
            f"{name} has shape {tuple(index.shape)}; accepted: one dimension of at most {size}"
        )
    if index.device != x.device:
        raise ValueError(f"{name} is on {index.device}; accepted: {x.device}, the device of x")


def check_ending(post: NormWeights | None, residual: bool, hidden: int, x: Tensor) -> None:
    """Raises ValueError or TypeError where the norm is no LayerNorm of x plus the block."""
    if post is None:
        return
    if post.kind != "layer" or post.weight is None or post.bias is None or not residual:
        raise ValueError("post is no LayerNorm with weight and bias over the sum with x; accepted")
    for part, tensor in (("weight", post.weight), ("bias", post.bias)):
        if tuple(tensor.shape) != (hidden,):
            raise ValueError(f"post.{part} has shape {tuple(tensor.shape)}; accepted: [{hidden}]")
        _check_place(f"post.{part}", tensor, x)


def _check_place(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}; accepted: {x.device}, the device of x")
    autocast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
    if tensor.dtype != x.dtype and not (autocast and tensor.is_floating_point()):
        raise TypeError(f"{name} has dtype {tensor.dtype}; accepted: {x.dtype}, the dtype of x")
