"""The equation in plain torch, for any device and floating dtype; the oracle of the kernel.

    y = 0 where h(i, seed) < 2^32 p, else x / (1 - p)

i is the element's number in the order of the contiguous x, and h a hash of 32 bits: with f
Wellons' lowbias32 (nullprogram.com/blog/2018/07/31), a permutation of 32 bits,
``h = f(f(low(i) + low(seed)) ^ (high(i) * 0x9e3779b9 + high(seed)))``.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def _mixed(x: Tensor) -> Tensor:
    # In int64: of a product that overflows, the low 32 bits are right.
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _WORD
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


def seeded_dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x of any shape -> its dropout, contiguous; seed int64 [1], on the device of x.

    An element is dropped with the probability round(2^32 p) / 2^32.
    """
    if p == 1.0:
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    low, high = seed & _WORD, (seed >> 32) & _WORD
    number = torch.arange(x.numel(), device=x.device)
    page = ((number >> 32) * 0x9E3779B9 + high) & _WORD
    drawn = _mixed(_mixed(((number & _WORD) + low) & _WORD) ^ page).view(x.shape)
    scaled = (x * (1.0 / (1.0 - p))).contiguous()
    return scaled.masked_fill_(drawn < min(round(p * 2**32), _WORD), 0.0)
