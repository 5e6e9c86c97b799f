"""The equation in plain torch, differentiated by torch: the oracle of the block.

y = post(x + output[:, kept](softmax(scale q kᵀ + mask) v)),  q, k, v = query[kept](x) ...
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimkern.ops._weights import AttentionWeights, LinearWeights
from slimkern.ops.ffn.reference import linear, norm


def masked_attention(
    x: Tensor, weights: AttentionWeights, kept: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """x [B, T, hidden] -> the same; ``kept`` are rows of q, k, v and columns of output.

    The mask is added to the scores, or bool and true where a key counts; [B or 1, heads or 1,
    T or 1, T].
    """
    w, d = weights, weights.head_dim
    if kept is None:
        kept = torch.arange(w.query.weight.shape[0])

    def rows(part: LinearWeights) -> Tensor:
        made = LinearWeights(part.weight[kept], None if part.bias is None else part.bias[kept])
        return linear(made, x).unflatten(-1, (-1, d)).transpose(1, 2)

    q, k, v = rows(w.query), rows(w.key), rows(w.value)
    scores = q @ k.transpose(2, 3) * (d**-0.5 if w.scale is None else w.scale)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    context = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    y = linear(LinearWeights(w.output.weight[:, kept], w.output.bias), context)
    return norm(w.post, x + y if w.residual else y)
