"""What kernels that pass over rows share: their slices of the tokens, and the choice of dropout."""

# mypy: disable-error-code="no-untyped-def"
# Device code has no Python types: its arguments are pointers, tensors or constants by turns.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# How many programs a pass over rows is cut into at most: enough of them in flight to hide the
# memory's latency on the largest GPUs, few enough for the sums of their slices to stay small.
_PROGRAMS = 1024


def unit_rows(x: Tensor) -> Tensor:
    """The same values with neighbours in a row side by side."""
    return x if x.stride(1) == 1 else x.contiguous()


def row_slices(blocks: int, M: int, step: int) -> tuple[int, int]:
    """Into how many slices M tokens are cut, and the tokens of each, a multiple of ``step``.

    It depends on sizes alone, never on the device, so that sums are taken in the same order
    everywhere.

    Args:
        blocks: programs that share a slice, each with its own columns.
        M: tokens, at least one.
        step: tokens that a program takes at a time.
    """
    steps = triton.cdiv(M, step)
    chunk = triton.cdiv(steps, max(_PROGRAMS // blocks, 1)) * step
    return triton.cdiv(M, chunk), chunk


def drop_threshold(p: float) -> int:
    """What `kept_by_seed` compares with: 2^32 p; beyond every hash where all is dropped."""
    return 2**32 if p == 1.0 else min(round(p * 2**32), 2**32 - 1)


@triton.jit
def _mixed(x):
    """lowbias32 by Chris Wellons (nullprogram.com/blog/2018/07/31): a permutation of 32 bits."""
    x = x ^ (x >> 16)
    x = tl.mul(x, tl.full(x.shape, 0x7FEB352D, tl.uint32), sanitize_overflow=False)
    x = x ^ (x >> 15)
    x = tl.mul(x, tl.full(x.shape, 0x846CA68B, tl.uint32), sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def kept_by_seed(number, seed, threshold):
    """Whether dropout keeps the elements of these numbers: ``seeded_dropout/reference.py``'s hash.

    Args:
        number: int64, of elements in the order of the contiguous tensor.
        seed: int64.
        threshold: an element is dropped where its hash is below it.
    """
    low = (number + seed).to(tl.uint32)  # of a sum, the low words follow from the low words
    page = tl.mul((number >> 32).to(tl.uint32), 0x9E3779B9, sanitize_overflow=False)
    page = tl.add(page, (seed >> 32).to(tl.uint32), sanitize_overflow=False)
    return _mixed(_mixed(low) ^ page).to(tl.int64) >= threshold
