"""``masked_attention``: validation, and the block put together from its functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slimkern.ops._masked import Ending, autocast_dtype
from slimkern.ops._masked_checks import check_block, check_ending, check_kept, check_linear
from slimkern.ops._masked_linears import (
    Backend,
)
from slimkern.ops._weights import AttentionWeights
from slimkern.ops.masked_attention.functions import MaskedOutputFn, MaskedQkvFn
from slimkern.ops.seeded_dropout import draw_seed
from slimkern.ops.seeded_dropout import dropout as drop


@dataclass(frozen=True)
class Kept:
    """What is kept of attention: whole heads, the same for all four linears.

    Attributes:
        query, key, value: kept rows of each, int64, sorted, unique; or None for all.
        output: kept columns, likewise.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    output: Tensor | None = None


def masked_attention(
    x: Tensor,
    weights: AttentionWeights,
    kept: Kept | None = None,
    mask: Tensor | None = None,
    *,
    attention_dropout: float = 0.0,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """``y = post(x + drop(output(softmax(scale q kᵀ + mask) v)))`` by the kept heads alone.

    One product gives q, k and v of the kept heads, attention is torch's own
    `scaled_dot_product_attention`, and the output projection reads the kept heads' columns.
    Differentiable once; gradients have the weights' full sizes and are zero outside the kept part.

    Under ``torch.autocast`` the linears are computed in its dtype. Attention then is float32 on a
    CPU, where torch's own in bfloat16 takes many times longer; on a GPU it is autocast's.

    Args:
        x: [B, T, hidden].
        weights: of full size; no ``pre``, not causal, as many key heads as query heads; ``post``
            is a LayerNorm over the sum, so that it needs the residual.
        kept: rows and columns; None for all. Values are not checked here.
        mask: added to the scores, floating; or bool, true where a key counts; [B or 1, kept heads
            or 1, T or 1, T].
        attention_dropout, dropout: the probability with which an attention weight and an output
            is zeroed, from torch's generator.
        backend: of the linears, ``reference``, ``cpu``, ``triton``; None: the device's default.

    Returns:
        [B, T, hidden] in the dtype of x; without residual in that of the products.

    Raises:
        ValueError: a shape, a device, dropout or the backend does not fit.
        TypeError: a dtype does not fit.
    """
    kept = Kept() if kept is None else kept
    _check(x, weights, kept, mask, attention_dropout, dropout)
    if kept.output is None or kept.output.shape[0] == weights.output.weight.shape[1]:
        kept = Kept()  # as many of each: all
    w, post, dtype = weights, weights.post, autocast_dtype(x)
    by = Backend.choose(backend, x, dtype)
    inner = torch.float32 if x.device.type == "cpu" and dtype == torch.bfloat16 else dtype
    q, k, v = MaskedQkvFn.apply(
        x, w.query.weight, w.query.bias, w.key.weight, w.key.bias, w.value.weight, w.value.bias,
        (kept.query, kept.key, kept.value), w.head_dim, dtype, inner, by,
    )  # fmt: skip
    if mask is not None and mask.is_floating_point():
        mask = mask.to(inner)
    with torch.autocast(x.device.type, enabled=False):
        context = _attend(q, k, v, mask, attention_dropout, w.scale)
    M = x.shape[0] * x.shape[1]
    folded = x.reshape(M, x.shape[2])
    y: Tensor = MaskedOutputFn.apply(
        context.transpose(1, 2).reshape(M, -1), folded, w.output.weight, w.output.bias,
        None if post is None else post.weight, None if post is None else post.bias,
        draw_seed(x.device) if dropout else None, kept.output, dtype,
        Ending(w.residual, None if post is None else post.eps, dropout), by,
    )  # fmt: skip
    return y.view(x.shape)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, scale: float | None
) -> Tensor:
    """softmax(scale q kᵀ + mask) v, [B, heads, T, d], by torch.

    Where something is dropped on a CPU, torch takes plain products and a dropout that draws its
    numbers one by one; here it is the products with `slimkern`'s own. There as here, a query that
    sees no key gets zeros.
    """
    if p == 0.0 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p, scale=scale)
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(2, 3)
    if mask is None:
        return drop(scores.softmax(-1), p) @ v
    kept = mask if mask.dtype == torch.bool else mask > -torch.inf
    blind = kept.any(-1, keepdim=True).logical_not()  # all keys to them, as no key gives NaN
    if mask.dtype == torch.bool:
        scores = scores.masked_fill((kept | blind).logical_not(), -torch.inf)
    else:
        scores = scores + mask.masked_fill(blind, 0.0)
    return (drop(scores.softmax(-1), p) @ v).masked_fill(blind, 0.0)


def _check(
    x: Tensor,
    weights: AttentionWeights,
    kept: Kept,
    mask: Tensor | None,
    attention_dropout: float,
    dropout: float,
) -> None:
    """Shapes, dtypes and devices; nothing that would wait for a device."""
    w = weights
    if w.pre is not None or w.causal:
        raise ValueError("weights has pre or is causal; accepted: neither")
    hidden = check_block(x, dropout)
    check_block(x, attention_dropout)
    if x.dim() != 3:
        raise ValueError(f"x has shape {tuple(x.shape)}; accepted: [B, T, hidden]")
    width = w.query.weight.shape[0]
    widths = []
    for name in ("query", "key", "value"):
        check_linear(name, getattr(w, name), (width, hidden), x)
        index = getattr(kept, name)
        check_kept(f"kept.{name}", index, width, x)
        widths.append(width if index is None else index.shape[0])
    check_linear("output", w.output, (hidden, width), x)
    check_kept("kept.output", kept.output, width, x)
    widths.append(width if kept.output is None else kept.output.shape[0])
    if len(set(widths)) > 1 or widths[0] % w.head_dim:
        raise ValueError(
            f"kept has {widths} entries of query, key, value and output; accepted: equal numbers, "
            f"a multiple of head_dim {w.head_dim}"
        )
    check_ending(w.post, w.residual, hidden, x)
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask has dtype {mask.dtype}; accepted: bool or floating")
