"""Dropout by a seed on the C++ row kernel: elements are numbered as in the contiguous x."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkern.ops import _native


def dropped(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x of any shape -> its dropout, contiguous; seed int64 [1].

    An element is dropped with the probability round(2^32 p) / 2^32.
    """
    if p == 1.0:
        return x.new_zeros(x.shape)
    x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    threshold = min(round(p * 2**32), 2**32 - 1)
    _native.drop(
        _native.dtype_code(x, "x"), seed.data_ptr(), threshold, 1.0 / (1.0 - p),
        x.data_ptr(), y.data_ptr(), x.numel(), _native.threads(),
    )  # fmt: skip
    return y
