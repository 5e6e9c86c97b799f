"""The equation on the C++ row kernel."""

from __future__ import annotations

from torch import Tensor

from slimkern.ops._drop import dropped


def seeded_dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x of any shape -> its dropout, contiguous; seed int64 [1].

    An element is dropped with the probability round(2^32 p) / 2^32.
    """
    return dropped(x, seed, p)
