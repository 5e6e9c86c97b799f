"""The equation in plain torch: ``y = x[0]`` along ``dim``, if ``x[i] == x[0]`` for every i."""

from __future__ import annotations

from torch import Tensor


def common_slice(x: Tensor, dim: int, otherwise: str) -> Tensor:
    """x of n slices along dim -> one slice, the dimension kept with size 1; a copy."""
    first = x.narrow(dim, 0, 1)
    if not bool((x == first).all()):
        raise ValueError(otherwise)
    return first.clone()
