"""The equation in plain torch, from ordinary weights: the oracle of the kernel.

    q, k, v = query(p), key(p), value(p),  p = pre(x), split in heads of head_dim
    s = scale q kᵀ + head_bias + mask,     -inf where a key is removed
    y = post(x + output(softmax(s) v))

x and y [B, T, hidden]. A query that sees no key has zeros for softmax(s) v. Rows at the end of a
sequence that the mask takes out there are zeros in y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimkern.ops._weights import AttentionWeights, LinearWeights
from slimkern.ops.ffn.reference import linear, norm

REMOVED = -1e30


def key_mask(mask: Tensor | None, x: Tensor) -> Tensor:
    """What is added to the scores, [B, T] in the dtype of x, from any of the three forms."""
    B, T = x.shape[:2]
    if mask is None:
        return x.new_zeros(B, T)
    if mask.dtype == torch.int64:
        mask = torch.arange(T, device=mask.device) < mask[:, None]
    if mask.dtype == torch.bool:
        return x.new_zeros(B, T).masked_fill(~mask, float("-inf"))
    return mask.to(x.dtype).masked_fill(mask <= REMOVED, float("-inf"))


def valid_rows(mask: Tensor) -> Tensor:
    """[B, T]: whether this key or a later one is kept."""
    kept = mask != float("-inf")
    return kept.flip(1).cummax(1).values.flip(1)


def attention_block(
    x: Tensor,
    weights: AttentionWeights,
    mask: Tensor | None = None,
    head_bias: Tensor | None = None,
) -> Tensor:
    """x [B, T, hidden] -> y [B, T, hidden]; the masks are those of the op."""
    B, T, _ = x.shape
    d = weights.head_dim
    pre = norm(weights.pre, x)

    def heads(part: LinearWeights) -> Tensor:
        return linear(part, pre).view(B, T, part.weight.shape[0] // d, d).transpose(1, 2)

    q, k, v = heads(weights.query), heads(weights.key), heads(weights.value)
    group = q.shape[1] // max(k.shape[1], 1)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    added = key_mask(mask, x)
    scores = q @ k.transpose(-1, -2) * (d**-0.5 if weights.scale is None else weights.scale)
    scores = scores + added[:, None, None]
    if head_bias is not None:
        scores = scores + head_bias.to(x.dtype)
    if weights.causal:
        scores = scores.masked_fill(torch.ones(T, T, device=x.device).triu(1).bool(), float("-inf"))
    unseen = (scores == float("-inf")).all(-1, keepdim=True)
    context = torch.softmax(scores.masked_fill(unseen, 0.0), -1).masked_fill(unseen, 0.0) @ v
    y = linear(weights.output, context.transpose(1, 2).flatten(2))
    y = norm(weights.post, x + y if weights.residual else y)
    return y.masked_fill(~valid_rows(added)[..., None], 0.0)
