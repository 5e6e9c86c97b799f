"""How products are computed: the one place of that rule.

The CPU's kernels know four ways, always with sums in float32:

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

On GPUs ``highest`` is fp32, ``high`` is tf32 (operands rounded to 11 bits; fp32 on AMD's, whose
matrix units multiply float32) and ``medium`` is bf16; models in bfloat16 and float16 compute in
their own type. Sums are in float32 as well.
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
_NAMES = {"bf16": "medium", "tf32": "high"}
_ON_GPU = {"highest": "fp32", "high": "tf32", "medium": "bf16"}
_NARROW = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def current_precision(device_type: str = "cpu") -> str:
    """PyTorch's float32 matmul precision: ``highest``, ``high`` or ``medium``.

    For the CPU ``torch.backends.mkldnn.matmul.fp32_precision``, which the older setter writes too.
    The older getter raises once a user has mixed both; it is read where a release of torch has no
    other. For GPUs ``torch.backends.cuda.matmul``, which knows no ``medium``: TF32 is that where
    the CPU's setting is.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    setting = getattr(matmul, "fp32_precision", None)
    name = torch.get_float32_matmul_precision() if setting is None else _NAMES.get(setting)
    if device_type == "cpu":
        return name or "highest"
    cuda = torch.backends.cuda.matmul
    # The older setting raises once a user has mixed both.
    new = getattr(cuda, "fp32_precision", None)
    if new != "tf32" if new is not None else not cuda.allow_tf32:
        return "highest"
    return "medium" if name == "medium" else "high"


def available_maths() -> tuple[str, ...]:
    """The ways to multiply that the instruction set in use has kernels for."""
    return tuple(_native.maths())


def choose_math(dtype: torch.dtype, precision: str | None = None, device_type: str = "cpu") -> str:
    """The name of the products' arithmetic: ``fp32``, ``bf16``, ``bf16x3``, ``bf16x6``; on GPUs
    ``fp32``, ``tf32``, ``bf16``, ``fp16``.

    Args:
        dtype: of the weights; float32 or bfloat16, on GPUs also float16.
        precision: ``highest``, ``high``, ``medium``, or None for PyTorch's setting of now.
        device_type: ``cpu`` or ``cuda``.

    Raises:
        TypeError: another dtype.
        ValueError: another precision.
    """
    accepted: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    if device_type != "cpu":
        accepted += (torch.float16,)
    if dtype not in accepted:
        raise TypeError(f"weights have dtype {dtype}; accepted: {', '.join(map(str, accepted))}")
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; accepted: None, {', '.join(PRECISIONS)}")
    if dtype in _NARROW:
        return _NARROW[dtype]
    precision = current_precision(device_type) if precision is None else precision
    if device_type != "cpu":
        math = _ON_GPU[precision]
        return "fp32" if math == "tf32" and torch.version.hip is not None else math
    have = available_maths()
    return next(math for math in _PREFERRED[precision] if math in have)
