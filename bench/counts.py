"""What a piece of work costs at least, and how many roundings lie on its longest way.

``flops`` and ``weights`` add up over a model; ``roundings`` and ``stores`` add up along the way
from an input to an output (see :class:`bench.work.Work`), so that what lies side by side (query,
key, value) counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

# A transcendental function (exp, erf) is a polynomial of about this many terms in float32.
FUNCTION = 8


@dataclass(frozen=True)
class Count:
    """Costs of a part; parts that follow each other are added.

    Attributes:
        flops: of its matrix products, 2 per multiply-add.
        weights: parameters that are read.
        roundings: lengths of the sums on the way through it, forward.
        back: the same on the way back, from the output's gradient to the input's.
        stores: tensors on the way that are rounded to storage, weights included.
    """

    flops: float = 0.0
    weights: float = 0.0
    roundings: int = 0
    back: int = 0
    stores: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(
            self.flops + other.flops,
            self.weights + other.weights,
            self.roundings + other.roundings,
            self.back + other.back,
            self.stores + other.stores,
        )


def linear(M: int, K: int, N: int, bias: bool = True) -> Count:
    """``M`` rows of ``K`` to ``N``: the weight and the output are stored."""
    return Count(2.0 * M * K * N, K * N + bias * N, roundings=K + bias, back=N, stores=2)


def gelu() -> Count:
    """Its polynomial and two products."""
    return Count(roundings=FUNCTION + 2, back=2 * FUNCTION, stores=1)


def add_and_norm(H: int) -> Count:
    """The residual's addition and a LayerNorm: mean and variance are sums of ``H``."""
    return Count(weights=2 * H, roundings=2 * H, back=2 * H, stores=2)


def attention(B: int, T: int, heads: int, d: int) -> Count:
    """softmax(q k^T) v. Stored: k beside q, the scores, the probabilities and v, the output."""
    return Count(
        flops=4.0 * B * heads * T * T * d,
        roundings=d + FUNCTION + 2 * T,  # scores, exp, its sum, the values
        back=d + 2 * T + d,
        stores=5,
    )


def attention_block(B: int, T: int, H: int, heads: int, d: int) -> Count:
    """Three projections side by side, attention, the output's projection, residual, LayerNorm."""
    one, width = linear(B * T, H, heads * d), heads * d
    beside = Count(flops=2 * one.flops, weights=2 * one.weights)
    return one + beside + attention(B, T, heads, d) + linear(B * T, width, H) + add_and_norm(H)


def ffn(M: int, H: int, width: int) -> Count:
    """First linear, GELU, second linear, residual, LayerNorm."""
    return linear(M, H, width) + gelu() + linear(M, width, H) + add_and_norm(H)


def layer(B: int, T: int, H: int, heads: int, d: int, width: int) -> Count:
    """An encoder layer."""
    return attention_block(B, T, H, heads, d) + ffn(B * T, H, width)


def embeddings(B: int, T: int, H: int) -> Count:
    """Three gathered rows are added, then a LayerNorm; of the tables, gathered rows count."""
    return Count(weights=(B * T + T + 1) * H, roundings=2) + add_and_norm(H)


def unpadded(count: Count, of: Callable[[int, int], Count], lengths: Sequence[int]) -> Count:
    """``count`` with the products of each sequence's own tokens alone.

    Args:
        count: of the padded batch.
        of: (sequences, tokens) -> what they cost.
        lengths: of the sequences.
    """
    return replace(count, flops=sum(of(1, length).flops for length in lengths))


def figures(
    count: Count, moved: float, rows: int = 0, written: float | None = None
) -> dict[str, float | int]:
    """``flops, values, roundings, stores`` of a Work.

    Args:
        count: of the forward; the input's own rounding to storage is added.
        moved: numbers in the input and in the output.
        rows: with a backward, how many rows a weight's gradient sums over; 0 without.
        written: with a backward, the numbers in all gradients of parameters, where they are not
            as many as are read.
    """
    figures = {
        "flops": count.flops,
        "values": count.weights + moved,
        "roundings": count.roundings,
        "stores": count.stores + 1,
    }
    if rows:  # each product has two in the backward; the gradients of y, x and weights move too
        figures["flops"] *= 3
        figures["values"] += moved + (count.weights if written is None else written)
        figures["roundings"] += count.back + rows
        figures["stores"] += count.stores + 2
    return figures
