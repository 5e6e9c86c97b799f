"""The equation on GPUs: the same choice for an element and a seed as everywhere else.

The seed is read on the device, so that nothing waits for it and a CUDA graph may hold the draw.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code has no Python types: its arguments are pointers, tensors or constants by turns.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slimkern.ops._launch import launch
from slimkern.ops._rows import drop_threshold, kept_by_seed
from slimkern.ops._tile import check_dtype, offsets


@triton.jit
def _seeded_dropout_kernel(x_ptr, seed_ptr, y_ptr, size, threshold, scale, BLOCK: tl.constexpr):
    """``BLOCK`` neighbours of the contiguous x."""
    number = offsets(tl.program_id(0), BLOCK)
    inside = number < size
    x = tl.load(x_ptr + number, mask=inside, other=0.0).to(tl.float32)
    kept = kept_by_seed(number, tl.load(seed_ptr), threshold)
    y = tl.where(kept, x * scale, 0.0)
    tl.store(y_ptr + number, y.to(y_ptr.dtype.element_ty), mask=inside)


_BLOCK = 2048


def seeded_dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x of any shape -> its dropout, contiguous; seed int64 [1], on the device of x.

    An element is dropped with the probability round(2^32 p) / 2^32.

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    check_dtype("x", x)
    if p == 1.0:
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    launch(_seeded_dropout_kernel, (triton.cdiv(x.numel(), _BLOCK),), x)(
        x, seed, y, x.numel(), drop_threshold(p), 1.0 / (1.0 - p),
        BLOCK=_BLOCK, num_warps=4, num_stages=2,
    )  # fmt: skip
    return y
