"""The equation in plain torch: ``y = x[0]`` along ``dim``, if ``x[i] == x[0]`` for every i."""

from __future__ import annotations

import torch
from torch import Tensor


def common_slice(x: Tensor, dim: int, otherwise: str) -> Tensor:
    """x of n slices along dim -> one slice, the dimension kept with size 1; a copy."""
    first = x.narrow(dim, 0, 1)
    if x.stride(dim) == 0:
        return first.clone()
    same = (x == first).all()
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        # A CUDA graph can't wait for a value: where it is replayed, the device itself complains.
        torch._assert_async(same, otherwise)
    elif not bool(same):
        raise ValueError(otherwise)
    return first.clone()
