"""The equation by NumPy, whose comparison along a broadcast dimension is a vector loop."""

from __future__ import annotations

import torch
from torch import Tensor


def common_slice(x: Tensor, dim: int, otherwise: str) -> Tensor:
    """x of n slices along dim -> one slice, the dimension kept with size 1; a copy."""
    first = x.narrow(dim, 0, 1)
    if x.stride(dim) == 0:
        return first.clone()
    # bfloat16 is not known to NumPy: equal bits are equal numbers.
    bits = [t.detach().view(torch.int16) if t.dtype == torch.bfloat16 else t for t in (x, first)]
    whole, one = (t.detach().numpy() for t in bits)
    if not bool((whole == one).all()):
        raise ValueError(otherwise)
    return first.clone()
