"""Cases of the fused blocks, and the measuring stick: what error a block may have.

The weights and x are rounded to the dtype under test first; then the equation is evaluated on them
in fp64, by eager torch at the same precision, and by the kernels. A block's error may exceed
eager's by what the rounding of its sums can do: the fp64 equation is evaluated again with each
linear's result moved, up or down at random, by the bound of a sum of its products: n roundings of
the sum in float32 and one of each operand. How far the block's result moves is the rounding term.
For the mean it is the root of n, by which independent roundings add up. Nothing here is tuned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from op_cases import ROUNDOFF
from torch import Tensor

from slimkern import ops
from slimkern.ops import (
    AttentionWeights,
    EncoderLayerWeights,
    FfnWeights,
    LinearWeights,
    NormWeights,
)
from slimkern.ops.attention_block import reference as attention_reference
from slimkern.ops.encoder_layer import reference as layer_reference
from slimkern.ops.encoder_stack import reference as stack_reference
from slimkern.ops.ffn import reference as ffn_reference
from slimkern.ops.packed_linear import reference as linear_reference

# kind of block -> what packs its weights, and what computes it
PACK = {
    "linear": lambda w, **k: ops.pack_linear(w.weight, w.bias, **k),
    "ffn": ops.pack_ffn,
    "attention_block": ops.pack_attention_block,
    "encoder_layer": ops.pack_encoder_layer,
}
CALL = {
    "linear": ops.packed_linear,
    "ffn": ops.ffn,
    "attention_block": ops.attention_block,
    "encoder_layer": ops.encoder_layer,
}

EQUATIONS = {
    "linear": linear_reference.packed_linear,
    "ffn": ffn_reference.ffn,
    "attention_block": attention_reference.attention_block,
    "encoder_layer": layer_reference.encoder_layer,
    "encoder_stack": stack_reference.encoder_stack,
}
# Relative rounding of an operand: one bfloat16, or the sum of two with the product of the two low
# parts left out; three hold a float32.
OPERAND = {"bf16": 2.0**-8, "bf16x3": 1.5 * 2.0**-16}
EAGER_DTYPE = {"bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """Sizes of a block; what is None is chosen like the model's."""

    B: int
    T: int
    hidden: int = 63
    heads: int = 3
    kv_heads: int = 3
    head_dim: int = 17
    channels: int = 130
    gated: bool = False
    activation: str = "gelu"
    norm: str = "post"  # post, pre, both, rms, none
    residual: bool = True
    causal: bool = False
    bias: bool = True

    @property
    def id(self) -> str:
        extra = [f.name for f in fields(self) if f.type == "bool" and getattr(self, f.name)]
        return (
            f"{self.B}x{self.T}-{self.hidden}-{self.heads}of{self.kv_heads}x{self.head_dim}"
            f"-{self.channels}-{self.activation}-{self.norm}-{'-'.join(extra)}"
        )


def make_linear(N: int, K: int, bias: bool, g: torch.Generator) -> LinearWeights:
    weight = torch.randn(N, K, generator=g, dtype=torch.float64) / max(K, 1) ** 0.5
    shift = torch.randn(N, generator=g, dtype=torch.float64) * 0.1 if bias else None
    return LinearWeights(weight, shift)


def _norms(shape: Shape, g: torch.Generator) -> dict[str, NormWeights | None]:
    def make() -> NormWeights:
        weight = torch.rand(shape.hidden, generator=g, dtype=torch.float64) + 0.5
        shift = torch.randn(shape.hidden, generator=g, dtype=torch.float64) * 0.1
        if shape.norm == "rms":
            return NormWeights(weight, None, 1e-6, "rms")
        return NormWeights(weight, shift if shape.bias else None, 1e-5)

    first, last = shape.norm in ("pre", "both", "rms"), shape.norm in ("post", "both")
    return {"pre": make() if first else None, "post": make() if last else None}


def make_ffn(shape: Shape, g: torch.Generator) -> FfnWeights:
    H, C = shape.hidden, shape.channels
    up = make_linear(C, H, shape.bias, g) if shape.gated else None
    return FfnWeights(
        make_linear(C, H, shape.bias, g), make_linear(H, C, shape.bias, g), up,
        shape.activation, residual=shape.residual, **_norms(shape, g),
    )  # fmt: skip


def make_attention(shape: Shape, g: torch.Generator) -> AttentionWeights:
    H, d = shape.hidden, shape.head_dim
    rows = (shape.heads * d, shape.kv_heads * d, shape.kv_heads * d)
    q, k, v = (make_linear(n, H, shape.bias, g) for n in rows)
    return AttentionWeights(
        q, k, v, make_linear(H, shape.heads * d, shape.bias, g), d,
        causal=shape.causal, residual=shape.residual, **_norms(shape, g),
    )  # fmt: skip


def make_weights(kind: str, shape: Shape, seed: int = 0) -> Any:
    """fp64 weights of a block."""
    g = torch.Generator().manual_seed(seed)
    if kind == "linear":
        return make_linear(shape.channels, shape.hidden, shape.bias, g)
    if kind == "ffn":
        return make_ffn(shape, g)
    if kind == "attention_block":
        return make_attention(shape, g)
    return EncoderLayerWeights(make_attention(shape, g), make_ffn(shape, g))


def cast(weights: Any, dtype: torch.dtype) -> Any:
    """The same description with every tensor in ``dtype``."""
    if isinstance(weights, Tensor):
        return weights.to(dtype)
    if isinstance(weights, list):
        return [cast(each, dtype) for each in weights]
    if not is_dataclass(weights) or isinstance(weights, type):
        return weights
    values = {f.name: cast(getattr(weights, f.name), dtype) for f in fields(weights)}
    return replace(weights, **values)


def make_x(shape: Shape, dtype: torch.dtype, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape.B, shape.T, shape.hidden, generator=g, dtype=torch.float64).to(dtype)


@contextmanager
def _moved(math: str, power: float, generator: torch.Generator) -> Iterator[None]:
    """Within it, a linear's result is moved by what its n roundings can do: n**power of them."""
    plain = F.linear
    operands = 2 * OPERAND.get(math, 0.0)

    def moved(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = plain(x, weight, bias)
        size = plain(x.abs(), weight.abs(), None if bias is None else bias.abs())
        n = x.shape[-1] + 1
        sign = torch.randint(0, 2, y.shape, generator=generator) * 2 - 1
        relative = n**power * ROUNDOFF[torch.float32] + n ** (power - 1) * operands
        return y + sign * relative * size

    F.linear = moved
    try:
        yield
    finally:
        F.linear = plain


@dataclass(frozen=True)
class Stick:
    """The exact result, and the errors that a kernel may have: at most, and in the mean."""

    exact: Tensor
    most: Tensor
    mean: float


def measuring_stick(
    kind: str, weights: Any, x: Tensor, math: str, mask: Tensor | None, bias: Tensor | None
) -> Stick:
    """Weights and x as they are stored; all that is derived from them."""
    equation: Callable[..., Tensor] = EQUATIONS[kind]
    extra = {} if kind in ("linear", "ffn") else {"mask": mask, "head_bias": bias}
    wide, wide_x = cast(weights, torch.float64), x.double()
    exact = equation(wide_x, wide, **extra)
    eager_dtype = EAGER_DTYPE.get(math, x.dtype)
    eager = equation(x.to(eager_dtype), cast(weights, eager_dtype), **extra).double()
    error = (eager - exact).abs()
    generator = torch.Generator().manual_seed(2)
    most = torch.zeros((), dtype=torch.float64)
    with _moved(math, 1.0, generator):
        for _ in range(3):
            most = torch.maximum(most, _largest(equation(wide_x, wide, **extra) - exact))
    with _moved(math, 0.5, generator):
        mean = (equation(wide_x, wide, **extra) - exact).abs().mean()
    stored = ROUNDOFF[x.dtype] * exact.abs()
    return Stick(
        exact,
        _largest(error) + most + stored,
        float(error.mean() + mean + stored.mean()),
    )


def _largest(error: Tensor) -> Tensor:
    return error.abs().max() if error.numel() else torch.zeros((), dtype=torch.float64)


def assert_within(got: Tensor, stick: Stick, dtype: torch.dtype) -> None:
    """Asserts shape, dtype and the bounds."""
    assert got.shape == stick.exact.shape
    assert got.dtype == dtype
    assert not got.isnan().any(), "NaN"
    error = (got.double() - stick.exact).abs()
    if error.numel() == 0:
        return
    worst = (error - stick.most).max().item()
    assert worst <= 0, f"error {error.max():.3e} exceeds its bound by {worst:.3e}"
    assert error.mean() <= stick.mean, f"mean error {error.mean():.3e}, bound {stick.mean:.3e}"
