"""The equation in plain torch, for any device and floating dtype; the oracle of the kernels.

    s = x + residual;    y = (s - mean) / sqrt(var + eps) * gamma + beta

With z the normalised row and g = dy * gamma, ds = (g - mean(g) - z mean(g z)) / sqrt(var + eps).
LayerNorm is that of Ba et al. (2016).
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_norm_fwd(
    x: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual [M, N], gamma, beta [N] -> y in residual's dtype, s, and stats [M, 3].

    s and stats (what is taken off, the factor, what is added after it) are float32, or float64
    where residual is.
    """
    wide = torch.promote_types(residual.dtype, torch.float32)
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
    grad: Tensor, s: Tensor, stats: Tensor, gamma: Tensor, narrow: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """grad, s [M, N] -> ds in grad's dtype; ds in bfloat16 where ``narrow``, else empty; sums.

    The sums over rows [3, N] are d_gamma, d_beta, and that of ds, in s's dtype.
    """
    center, scale, offset = stats.unsqueeze(2).unbind(1)
    z = (s - center) * scale + offset
    wide = grad.to(s.dtype)
    g = wide * gamma.to(s.dtype)
    ds = scale * (g - g.mean(1, keepdim=True) - z * (g * z).mean(1, keepdim=True))
    sums = torch.stack([(wide * z).sum(0), wide.sum(0), ds.sum(0)])
    low = ds.to(torch.bfloat16) if narrow else ds.new_empty(0, dtype=torch.bfloat16)
    return ds.to(grad.dtype).contiguous(), low.contiguous(), sums
