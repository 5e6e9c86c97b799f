"""What all linear layers share: what autocast does to their arguments, and what is refused."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments as autocast gives them to a linear layer; themselves where it is off.

    Floating tensors other than double are cast to autocast's dtype.
    """
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(tensor: Tensor) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor

    return cast(x), cast(weight), None if bias is None else cast(bias)


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Shapes, dtypes and devices of x [..., *], weight [N, K], bias [N]; waits for no device.

    Raises:
        ValueError: a shape or a device does not fit.
        TypeError: a dtype does not fit.
    """
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; accepted: a floating dtype")
    if x.dim() < 1:
        raise ValueError("x has no dimension; accepted: [..., C]")
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; accepted: [N, K]")
    N = weight.shape[0]
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != N):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; accepted: [{N}], one per weight row")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; accepted: {x.dtype}, the dtype of x")
        check_device(name, tensor, x)


def check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    """Raises ValueError where a tensor is not on the device of x."""
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}; accepted: {x.device}, the device of x")
