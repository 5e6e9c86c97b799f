"""Columns of a weight set to zero, where they are not zero already."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkern.ops import _native

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def zero_columns_(weight: Tensor, keep: Tensor) -> Tensor:
    """Set the columns of ``weight`` that ``keep`` does not name to zero, in place.

    Columns that are zero already are read and not written: between two changes of a mask, after
    which momentum may still move them, a step costs one pass of reading.

    Args:
        weight: [N, K], floating.
        keep: int64, sorted, unique, within K.

    Returns:
        weight.
    """
    N, K = weight.shape
    size = weight.element_size()
    if not weight.is_cpu or weight.stride(1) != 1 or size == 1 or type(weight.data) is not Tensor:
        dead = torch.ones(K, dtype=torch.bool, device=weight.device)
        dead[keep] = False
        return weight.masked_fill_(dead, 0)
    bits = torch.full((K,), -1, dtype=_BITS[size]).index_fill_(0, keep, 0)
    place = _native.rows_of(weight)
    if _native.zero_columns(8 * size, place, N, K, bits.data_ptr(), _native.threads()):
        torch.autograd.graph.increment_version(weight)  # as every write of torch's own does
    return weight
