"""Activations and their derivatives on the device, for the epilogues and row passes of kernels.

The equations are those of ``activation/reference.py``, computed in float32 and in forms that lose
nothing where a tail is small: ``tanh`` and ``sigmoid`` share one exponential,
``x/2 (1 + tanh u) = x sigmoid(2 u)``, and nothing is subtracted from 1.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code has no Python types: its arguments are pointers, tensors or constants by turns.

from __future__ import annotations

import triton
import triton.language as tl

# Constants stand to the right of tensors: the interpreter takes the left operand's arithmetic.
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_TANH_INNER = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi): u is doubled for sigmoid
_TANH_CUBIC = tl.constexpr(0.044715)
_QUICK = tl.constexpr(1.702)


@triton.jit
def _sigmoid(x):
    """1 / (1 + e^-x) of float32."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _gelu_tanh_argument(x):
    """2 u with ``u = sqrt(2 / pi) (x + 0.044715 x^3)``."""
    return x * _TANH_INNER * (x * x * _TANH_CUBIC + 1.0)


@triton.jit
def activation_value(x, NAME: tl.constexpr):
    """a(x) in float32; ``x`` of any floating type, ``NAME`` one of `activation.api.ACTIVATIONS`."""
    x = x.to(tl.float32)
    if NAME == "none":
        y = x
    elif NAME == "relu":
        y = tl.where(x < 0.0, 0.0, x)  # not a maximum, which would drop a NaN
    elif NAME == "squared_relu":
        y = tl.where(x < 0.0, 0.0, x * x)
    elif NAME == "gelu":
        y = x * (0.5 * (1.0 + tl.erf(x * _SQRT_HALF)))
    elif NAME == "gelu_tanh":
        y = x * _sigmoid(_gelu_tanh_argument(x))
    elif NAME == "quick_gelu":
        y = x * _sigmoid(x * _QUICK)
    else:
        tl.static_assert(NAME == "silu", "an activation without a kernel")
        y = x * _sigmoid(x)
    return y


@triton.jit
def activation_slope(x, NAME: tl.constexpr):
    """a'(x) in float32: what a gradient is multiplied by."""
    x = x.to(tl.float32)
    if NAME == "none":
        y = tl.full(x.shape, 1.0, tl.float32)
    elif NAME == "relu":
        y = tl.where(x > 0.0, 1.0, 0.0)
    elif NAME == "squared_relu":
        y = tl.where(x < 0.0, 0.0, 2.0 * x)
    elif NAME == "gelu":
        bell = tl.exp(-0.5 * x * x) * _INV_SQRT_2PI
        y = 0.5 * (1.0 + tl.erf(x * _SQRT_HALF)) + x * bell
    elif NAME == "gelu_tanh":
        u = _gelu_tanh_argument(x)
        s, rest = _sigmoid(u), _sigmoid(-u)
        y = s + x * s * rest * ((x * x * (3.0 * _TANH_CUBIC) + 1.0) * _TANH_INNER)
    elif NAME == "quick_gelu":
        s, rest = _sigmoid(x * _QUICK), _sigmoid(-x * _QUICK)
        y = s + x * _QUICK * s * rest
    else:
        tl.static_assert(NAME == "silu", "an activation without a kernel")
        s, rest = _sigmoid(x), _sigmoid(-x)
        y = s + x * s * rest
    return y
