"""The equation in plain torch, for any device and floating dtype; the oracle of the kernel.

    y = 0 with probability p, else x / (1 - p);   the choice is a function of the seed

The choices of this one come from a torch generator with that seed, those of the C++ kernel from a
hash of the element's number: each agrees with itself, not with the other.
"""

from __future__ import annotations

import torch
from torch import Tensor


def seeded_dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x of any shape -> its dropout, contiguous; seed int64 [1], on the CPU."""
    if p == 1.0:
        return x.new_zeros(x.shape)
    generator = torch.Generator(x.device).manual_seed(int(seed))
    kept = torch.empty(x.shape, device=x.device).bernoulli_(1.0 - p, generator=generator)
    scaled = (x * (1.0 / (1.0 - p))).contiguous()
    return scaled.masked_fill_(kept == 0, 0.0)
