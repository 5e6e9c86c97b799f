"""What the tests of Triton kernels share: where they run, in which dtypes, and the bound."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from op_cases import ROUNDOFF
from torch import Tensor

from slimkern.ops import _tile

GPU = torch.cuda.is_available()
INTERPRETED = _tile.INTERPRETED.value
DEVICES = [
    pytest.param(
        "cpu",
        id="interpreter",
        marks=pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not set"),
    ),
    pytest.param(
        "cuda",
        id="gpu",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not GPU or INTERPRETED, reason="no GPU, or interpreted"),
        ],
    ),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DTYPE_IDS = ["fp32", "fp16", "bf16"]


def skip_interpreted_bf16(dtype: torch.dtype, device: str) -> None:
    """The interpreter cuts bfloat16 results off instead of rounding them."""
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("the interpreter cuts bfloat16 results off instead of rounding them")


def assert_sum_of_products(
    got: Tensor, want: Tensor, eager: Tensor, magnitude: Tensor, terms: int
) -> None:
    """|got - want| <= eager's worst error + terms * u * magnitude + the rounding of the result.

    Args:
        got, want, eager: the kernel's result, the fp64 equation, and torch in the kernel's dtype.
        magnitude: the sum of the products' absolute values, times how far a rounding of the sum
            can move the result.
        terms: how many roundings a sum may have, of unit u of float32.
    """
    assert got.shape == want.shape
    assert got.dtype == eager.dtype
    if got.numel() == 0:
        return
    error = (got.double() - want).abs()
    assert not error.isnan().any(), "NaN"
    rounding = ROUNDOFF[got.dtype] * want.abs()
    bound = (eager.double() - want).abs().max() + terms * 2.0**-24 * magnitude + rounding
    worst = (error - bound).max().item()
    assert worst <= 0, f"error {error.max():.3e} exceeds its bound by {worst:.3e}"


def moved(weights: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    """A description of weights with every tensor on a device, and of a dtype if one is given."""
    if isinstance(weights, Tensor):
        return weights.to(device, dtype)
    if not is_dataclass(weights) or isinstance(weights, type):
        return weights
    values = {f.name: moved(getattr(weights, f.name), device, dtype) for f in fields(weights)}
    return replace(weights, **values)
