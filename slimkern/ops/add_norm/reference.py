"""The equation in plain torch, for any device and floating dtype; the oracle of the kernels.

    s = drop(x) + residual;    y = (s - mean) / sqrt(var + eps) * gamma + beta

With z the normalised row and g = dy * gamma, ds = (g - mean(g) - z mean(g z)) / sqrt(var + eps).
LayerNorm is that of Ba et al. (2016). What is dropped, with probability p, follows from a seed, as
in `seeded_dropout`; nothing is where there is none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimkern.ops.seeded_dropout.reference import seeded_dropout


def add_norm_fwd(
    x: Tensor,
    residual: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    seed: Tensor | None,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual [M, N], gamma, beta [N] -> y in residual's dtype, s, and stats [M, 3].

    s and stats (what is taken off, the factor, what is added after it) are float32, or float64
    where residual is.
    """
    wide = torch.promote_types(residual.dtype, torch.float32)
    if seed is not None:
        x = seeded_dropout(x, seed, p)
    s = x.to(wide) + residual.to(wide)
    mean = s.mean(1, keepdim=True)
    scale = torch.rsqrt((s - mean).square().mean(1, keepdim=True) + eps)
    y = (s - mean) * scale * gamma.to(wide) + beta.to(wide)
    return (
        y.to(residual.dtype).contiguous(),
        s.contiguous(),
        torch.cat([mean, scale, torch.zeros_like(mean)], 1),
    )


def add_norm_grad(
    grad: Tensor,
    s: Tensor,
    stats: Tensor,
    gamma: Tensor,
    narrow: bool,
    seed: Tensor | None,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad, s [M, N] -> ds in grad's dtype, dx, and sums over rows [3, N] in s's dtype.

    dx is the gradient of x where that is not ds itself: in bfloat16 where ``narrow``, with what was
    dropped where there is a seed; else it is empty. The sums are d_gamma, d_beta, and that of the
    gradient of x.
    """
    center, scale, offset = stats.unsqueeze(2).unbind(1)
    z = (s - center) * scale + offset
    wide = grad.to(s.dtype)
    g = wide * gamma.to(s.dtype)
    ds = scale * (g - g.mean(1, keepdim=True) - z * (g * z).mean(1, keepdim=True))
    to_x = ds if seed is None else seeded_dropout(ds, seed, p)
    sums = torch.stack([(wide * z).sum(0), wide.sum(0), to_x.sum(0)])
    dtype = torch.bfloat16 if narrow else grad.dtype
    apart = narrow or seed is not None
    dx = to_x.to(dtype).contiguous() if apart else ds.new_empty(0, dtype=dtype)
    return ds.to(grad.dtype).contiguous(), dx, sums
