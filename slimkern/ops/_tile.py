"""Shared Triton helpers: masked tiles on the device; choice of tiles and precision on the host.

Everything an op's ``triton.py`` has in common with the next op's, and nothing that knows an op.
Offsets are int64 throughout: a token's offset times a row stride passes 2**31 long before a GPU's
memory is full.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code has no Python types: its arguments are pointers, tensors or constants by turns.

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def swizzle(pid, num_a, num_b, GROUP: tl.constexpr):
    """Program id -> (tile a, tile b), in groups of ``GROUP`` rows of tiles that share L2 lines."""
    per_group = GROUP * num_b
    first = (pid // per_group) * GROUP
    size = tl.minimum(num_a - first, GROUP)
    within = pid % per_group
    return first + within % size, within // size


# A kernel knows whether it is being interpreted; the flag is a constant to the compiler.
INTERPRETED = tl.constexpr(not isinstance(swizzle, triton.JITFunction))


@triton.jit
def offsets(tile, BLOCK: tl.constexpr):
    """The int64 positions of tile number ``tile``."""
    return tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def with_alignment(size, ALIGN: tl.constexpr):
    """``size``, a multiple of ``ALIGN`` by the launcher's promise, in a form that says so.

    Triton itself only tells multiples of 16 from all other numbers. The widths that slimming leaves
    (308, 40) are multiples of 4 or 8, and the compiler needs to know for wide loads.
    """
    return (size // ALIGN) * ALIGN


@triton.jit
def gather_index(index_ptr, offs, mask, HAS_INDEX: tl.constexpr):
    """Positions in the full-size tensor of the compact positions ``offs``."""
    if HAS_INDEX:
        return tl.load(index_ptr + offs, mask=mask, other=0)
    return offs


@triton.jit
def load_tile(ptr, offs_0, stride_0, mask_0, offs_1, stride_1, mask_1):
    """The 2-D tile at ``offs_0 x offs_1``; zeros where either mask is off."""
    pointers = ptr + (offs_0 * stride_0)[:, None] + (offs_1 * stride_1)[None, :]
    return tl.load(pointers, mask=mask_0[:, None] & mask_1[None, :], other=0.0)


@triton.jit
def store_tile(ptr, value, offs_0, stride_0, mask_0, offs_1, stride_1, mask_1):
    """Writes ``value``, rounded once to the destination's type, at ``offs_0 x offs_1``."""
    pointers = ptr + (offs_0 * stride_0)[:, None] + (offs_1 * stride_1)[None, :]
    mask = mask_0[:, None] & mask_1[None, :]
    tl.store(pointers, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b``, accumulated in float32."""
    if INTERPRETED:
        # The interpreter keeps bfloat16 as raw 16-bit integers and would multiply those. Products
        # of two halves are exact in float32, so widening changes no result.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


class Tile(NamedTuple):
    """One configuration of a tiled kernel: an ``a x b`` output tile, reduced ``k`` at a time.

    ``registers`` is the most that a thread takes on NVIDIA GPUs, 0 where that is left to the
    assembler. It aims at a number of programs per multiprocessor, and spills a few registers to get
    there; told a limit, it takes what it needs below that.
    """

    a: int
    b: int
    k: int
    warps: int
    stages: int
    registers: int = 0


# Types whose products are exact in float32, and float32 itself.
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ON_AMD = torch.version.hip is not None
# Multiprocessors of an H100. A constant, so that sums are taken in the same order everywhere.
_PROCESSORS = 132


def bucket(size: int) -> int:
    """The power of two at or above ``size``: close sizes share a configuration and its compile."""
    return 1 << max(size - 1, 0).bit_length()


def _waves(programs: int) -> int:
    return -(-programs // _PROCESSORS)


def _cost(tile: Tile, a: int, b: int, slices: int) -> float:
    """What an output takes: rounds of tiles, times what a tile multiplies and what it loads.

    A matrix unit multiplies 64 rows in the time that one row is loaded. The slices of a reduction
    take part of the time each.
    """
    programs = -(-a // tile.a) * -(-b // tile.b)
    many = max(1, min(slices, 2 * _PROCESSORS // programs))
    return _waves(programs * many) / many * (tile.a * tile.b + 64 * (tile.a + tile.b))


def choose_tile(tiles: Sequence[Tile], a: int, b: int, slices: int = 1) -> Tile:
    """The one of ``tiles`` that should take the least time on a large GPU; the largest of equals.

    Args:
        tiles: configurations, from the largest output tile to the smallest.
        a, b: the output's sizes.
        slices: into how many slices the caller can cut the reduction.
    """
    return min(tiles, key=lambda tile: _cost(tile, max(a, 1), max(b, 1), slices))


def splits(programs: int, steps: int, least_steps: int = 4) -> int:
    """Into how many slices a reduction of ``steps`` blocks is cut so that the GPU has work.

    The rounds that programs take, and what it takes to write and read a sum once more, put
    at a dozen blocks of its reduction. It depends on sizes alone, never on the device, so that sums
    are taken in the same order everywhere.
    """
    programs = max(programs, 1)

    def cost(slices: int) -> float:
        again = 12 * slices * programs / (_PROCESSORS * steps) if slices > 1 else 0.0
        return _waves(programs * slices) / slices + again

    most = min(2 * _PROCESSORS // programs, steps // least_steps)
    return min(range(1, max(most, 1) + 1), key=cost)


def alignment(*sizes: int) -> int:
    """The largest power of two, at most 16, that divides every size and stride given."""
    align = 16
    for size in sizes:
        while size % align:
            align //= 2
    return align


def launch_options(tile: Tile) -> dict[str, int]:
    """``num_warps`` and ``num_stages`` of a launch, and its limit of registers where it has one.

    An AMD compute unit has 64 KiB of local memory, so its pipeline is two stages deep.
    """
    if ON_AMD:
        return {"num_warps": tile.warps, "num_stages": min(tile.stages, 2)}
    limit = {"maxnreg": tile.registers} if tile.registers else {}
    return {"num_warps": tile.warps, "num_stages": tile.stages} | limit


@lru_cache
def _properties(index: int) -> tuple[int, int]:
    made = torch.cuda.get_device_properties(index)
    return 10 * made.major + made.minor, made.multi_processor_count


def capability(tensor: Tensor) -> int:
    """Compute capability of the NVIDIA GPU that holds ``tensor``, 90 for 9.0; 0 for all others."""
    if not tensor.is_cuda or ON_AMD:
        return 0
    return _properties(tensor.get_device())[0]


def processors(tensor: Tensor) -> int:
    """How many multiprocessors the GPU has; the number of programs that share work in a loop."""
    return _properties(tensor.get_device())[1] if tensor.is_cuda else _PROCESSORS


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the GPU of ``tensor`` the current one; costs next to nothing where it already is."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def check_dtype(name: str, tensor: Tensor) -> None:
    """Refuses what the kernels do not compute in.

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    if tensor.dtype not in _DTYPES:
        accepted = ", ".join(map(str, _DTYPES))
        raise TypeError(f"{name} has dtype {tensor.dtype}; backend 'triton' accepts {accepted}")


def precision(dtype: torch.dtype) -> str:
    """Triton's name for the float32 matmul precision that PyTorch's own settings ask for.

    ``tf32`` only where ``torch.set_float32_matmul_precision`` or ``torch.backends`` allows it, and
    ``ieee`` otherwise. On AMD GPUs always ``ieee``: their matrix units multiply float32 natively.
    """
    if dtype != torch.float32 or ON_AMD:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # `allow_tf32` may raise once a user has mixed the two settings; `fp32_precision` never does,
    # but only newer releases of torch have it.
    if hasattr(matmul, "fp32_precision"):
        return "tf32" if matmul.fp32_precision == "tf32" else "ieee"
    return "tf32" if matmul.allow_tf32 else "ieee"


def contiguous(index: Tensor | None) -> Tensor | None:
    """An index vector as kernels read it, with stride 1; None stays None."""
    return None if index is None else index.contiguous()


def zeros_unless(whole: bool, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A gradient's memory: zeros, unless every entry is going to be written."""
    make = torch.empty if whole else torch.zeros
    return make(shape, dtype=like.dtype, device=like.device)
