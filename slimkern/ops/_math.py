"""How float32 products are computed on the CPU: the one place of that rule.

The kernels know four ways, always with sums in float32:

====== =========================================================================
fp32   float32 products
bf16   both operands rounded to bfloat16
bf16x3 both operands as the sum of two bfloat16 numbers: three products of them
bf16x6 both operands as the sum of three: six products, the whole float32 mantissa
====== =========================================================================

The last two exist where the processor multiplies bfloat16 many times faster than float32 (AMX).
Which one is taken is PyTorch's own setting, `torch.set_float32_matmul_precision`:

* ``highest``: bf16x6 where it exists, else fp32. On a machine with AMX the tile unit has 16 times
  the rate of the float32 unit, so that six products are 2.7 times as fast as one; what they leave
  out is below 2**-24 of a product, half of what rounding a float32 product costs.
* ``high``: bf16x3 where it exists, else as ``highest``.
* ``medium``: bf16.

A model in bfloat16 computes in bf16, whatever the setting.
"""

from __future__ import annotations

import torch

from slimkern.ops import _native

PRECISIONS = ("highest", "high", "medium")
_PREFERRED = {
    "highest": ("bf16x6", "fp32"),
    "high": ("bf16x3", "bf16x6", "fp32"),
    "medium": ("bf16", "fp32"),
}
_NEW_NAMES = {"bf16": "medium", "tf32": "high"}


def current_precision() -> str:
    """PyTorch's float32 matmul precision for the CPU: ``highest``, ``high`` or ``medium``.

    ``torch.backends.mkldnn.matmul.fp32_precision``, which the older setter writes too. The older
    getter raises once a user has mixed both; it is read where a release of torch has no other.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    setting = getattr(matmul, "fp32_precision", None)
    if setting is not None:
        return _NEW_NAMES.get(setting, "highest")
    return torch.get_float32_matmul_precision()


def available_maths() -> tuple[str, ...]:
    """The ways to multiply that the instruction set in use has kernels for."""
    return tuple(_native.maths())


def choose_math(dtype: torch.dtype, precision: str | None = None) -> str:
    """The name of the products' arithmetic: ``fp32``, ``bf16``, ``bf16x3`` or ``bf16x6``.

    Args:
        dtype: of the weights; float32 or bfloat16.
        precision: ``highest``, ``high``, ``medium``, or None for PyTorch's setting of now.

    Raises:
        TypeError: another dtype.
        ValueError: another precision.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"weights have dtype {dtype}; accepted: torch.float32, torch.bfloat16")
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; accepted: None, {', '.join(PRECISIONS)}")
    if dtype == torch.bfloat16:
        return "bf16"
    have = available_maths()
    wanted = _PREFERRED[current_precision() if precision is None else precision]
    return next(math for math in wanted if math in have)
