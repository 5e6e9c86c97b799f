"""What a block computes: its ordinary weights and how they are put together.

Frozen descriptions, of which the references compute and from which packs are made. A linear's
weight is [N, K] as in `torch.nn.Linear`; a bias is [N] or None.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LinearWeights:
    """``y = x @ weightᵀ + bias``."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class NormWeights:
    """``y = (x - mean) / sqrt(var + eps) * weight + bias``, or without mean for ``rms``.

    Attributes:
        weight: [hidden], or None for one.
        bias: [hidden], or None for zero.
        eps: added to the variance.
        kind: ``layer`` or ``rms`` (``x / sqrt(mean(x²) + eps)``).
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5
    kind: str = "layer"


@dataclass(frozen=True)
class FfnWeights:
    """``y = post(x + fc2(a(fc1(pre(x)))))``; gated: ``fc2(a(fc1(.)) * up(.))``.

    Attributes:
        fc1: [channels, hidden]; of a gated FFN the one that is activated.
        fc2: [hidden, channels].
        up: [channels, hidden] of a gated FFN, or None.
        activation: ``none``, ``relu``, ``squared_relu``, ``gelu``, ``gelu_tanh``, ``quick_gelu``
            or ``silu``.
        pre, post: norms, or None.
        residual: whether x is added.
    """

    fc1: LinearWeights
    fc2: LinearWeights
    up: LinearWeights | None = None
    activation: str = "gelu"
    pre: NormWeights | None = None
    post: NormWeights | None = None
    residual: bool = True


@dataclass(frozen=True)
class AttentionWeights:
    """``y = post(x + output(softmax(scale q kᵀ + masks) v))``, q, k, v from ``pre(x)``.

    The heads are those of the weights: with ``head_dim`` d, ``query`` has heads * d rows, ``key``
    and ``value`` have kv_heads * d. Query head h reads key head h // (heads / kv_heads).

    Attributes:
        query, key, value: [.. * d, hidden].
        output: [hidden, heads * d].
        head_dim: d, 1 to 256.
        scale: of the scores; None: 1 / sqrt(d).
        causal: a query sees no later key.
        pre, post: norms, or None.
        residual: whether x is added.
    """

    query: LinearWeights
    key: LinearWeights
    value: LinearWeights
    output: LinearWeights
    head_dim: int
    scale: float | None = None
    causal: bool = False
    pre: NormWeights | None = None
    post: NormWeights | None = None
    residual: bool = True


@dataclass(frozen=True)
class EncoderLayerWeights:
    """``ffn(attention(x))``: post-norm (BERT) where both have ``post``, pre-norm with ``pre``."""

    attention: AttentionWeights
    ffn: FfnWeights
