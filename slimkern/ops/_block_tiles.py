"""What a block mask means to tiled kernels: what of a weight holds nothing, and masked copies.

The reduction of a product is cut into *steps* of ``STEP`` entries. For every tile of outputs a
:class:`Schedule` lists the steps in which the tile keeps any weight; a kernel goes through those
alone. Lists are made from the mask's bits by two small kernels, without atomics and without waiting
for the device, so that a CUDA graph can hold them.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code has no Python types: its arguments are pointers, tensors or constants by turns.

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from slimkern.ops._tile import load_tile, offsets, on_device, store_tile

STEP = 32
_STEPS_AT_ONCE = 8  # of a program that looks for kept bits
_LIST_BLOCK = 256  # steps that a program sorts at once


@triton.jit
def kept_tile(bits_ptr, stride, n, mask_n, k, mask_k, bn, bk, K_FIRST: tl.constexpr):
    """Which weights at outputs ``n`` x inputs ``k`` are kept: bool [n, k], or [k, n].

    ``bits_ptr`` as in ``BlockMask``: bit ``j % 8`` of byte ``j // 8`` is block column ``j``.
    """
    row = n // bn * stride
    column = k // bk
    byte = column // 8
    shift = (column % 8).to(tl.int32)
    if K_FIRST:
        bits = load_tile(bits_ptr, byte, 1, mask_k, row, 1, mask_n).to(tl.int32) >> shift[:, None]
    else:
        bits = load_tile(bits_ptr, row, 1, mask_n, byte, 1, mask_k).to(tl.int32) >> shift[None, :]
    return (bits & 1) != 0


@triton.jit
def _flags_kernel(
    bits_ptr, flags_ptr,
    N, K, bn, bk, stride_bits, stride_flags,
    STEP: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """flags[i, j]: whether square j of row i of squares, ``STEP`` a side, keeps any weight."""
    n = offsets(tl.program_id(0), STEP)
    k = offsets(tl.program_id(1), STEP * STEPS)
    kept = kept_tile(bits_ptr, stride_bits, n, n < N, k, k < K, bn, bk, K_FIRST=False)
    columns = tl.max(kept.to(tl.int32), axis=0)
    flags = tl.max(tl.reshape(columns, (STEPS, STEP)), axis=1)
    place = offsets(tl.program_id(1), STEPS)
    inside = place < tl.cdiv(K, STEP)
    row = tl.program_id(0).to(tl.int64) * stride_flags
    tl.store(flags_ptr + row + place, flags.to(tl.uint8), mask=inside)


@triton.jit
def _list_kernel(
    flags_ptr, list_ptr, counts_ptr,
    squares, steps, stride_square, stride_step,
    SQUARES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The steps of one tile of ``SQUARES`` squares: those that keep something, in order; the rest.

    What keeps nothing stands at the end, from the back, so that a list is a permutation.
    """
    tile = tl.program_id(0).to(tl.int64)
    square = offsets(tile, SQUARES)
    list_ptr += tile * steps
    kept_before = tl.zeros((), dtype=tl.int32)
    empty_before = tl.zeros((), dtype=tl.int32)
    for block in range(tl.cdiv(steps, BLOCK)):
        step = offsets(block, BLOCK)
        inside = step < steps
        flags = load_tile(
            flags_ptr, square, stride_square, square < squares, step, stride_step, inside
        )
        kept = tl.max(flags.to(tl.int32), axis=0)
        empty = inside.to(tl.int32) - kept
        from_front = kept_before + tl.cumsum(kept, axis=0) - 1
        from_back = steps - empty_before - tl.cumsum(empty, axis=0)
        place = tl.where(kept != 0, from_front, from_back)
        tl.store(list_ptr + place, step.to(tl.int32), mask=inside)
        kept_before += tl.sum(kept, axis=0)
        empty_before += tl.sum(empty, axis=0)
    tl.store(counts_ptr + tile, kept_before)


@triton.jit
def _copy_kernel(
    weight_ptr, bits_ptr, out_ptr,
    N, K, bn, bk,
    stride_wn, stride_wk, stride_bits, stride_on, stride_ok,
    IN_PLACE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of W ∘ mask; what is masked is not read. In place, zeros alone are written."""
    n = offsets(tl.program_id(1), BLOCK_N)
    k = offsets(tl.program_id(0), BLOCK_K)
    mask_n = n < N
    mask_k = k < K
    kept = kept_tile(bits_ptr, stride_bits, n, mask_n, k, mask_k, bn, bk, K_FIRST=False)
    inside = mask_n[:, None] & mask_k[None, :]
    if IN_PLACE:
        pointers = out_ptr + (n * stride_on)[:, None] + (k * stride_ok)[None, :]
        zeros = tl.zeros((BLOCK_N, BLOCK_K), dtype=out_ptr.dtype.element_ty)
        tl.store(pointers, zeros, mask=inside & ~kept)
    else:
        pointers = weight_ptr + (n * stride_wn)[:, None] + (k * stride_wk)[None, :]
        tile = tl.load(pointers, mask=kept & inside, other=0.0)
        store_tile(out_ptr, tile, n, stride_on, mask_n, k, stride_ok, mask_k)


@dataclass
class Schedule:
    """The steps in which each tile of outputs keeps any weight.

    Attributes:
        steps: int32 [tiles, all steps]: those with weights, ascending, and then the others.
        counts: int32 [tiles]: how many there are with weights.
        share: of all steps, those with weights; None until :func:`kept_share` has read it.
    """

    steps: Tensor
    counts: Tensor
    share: float | None = None


@dataclass
class _Known:
    """What is known of the bits of a mask, as long as they don't change.

    Attributes:
        state: as of `_state`, when they were read.
        stream: on which they were read.
        flags: as of `_flags`.
        schedules: by the outputs of a tile, and whether the weight is turned.
    """

    state: tuple[int, ...]
    stream: int
    flags: Tensor
    schedules: dict[tuple[int, bool], Schedule] = field(default_factory=dict)


_known = WeakIdKeyDictionary()


def _state(bits: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> tuple[int, ...]:
    """What flags are made from: the version of the bits, and the mask that they are taken for."""
    return (bits._version, *block, *shape)


def schedule(
    bits: Tensor, block: tuple[int, int], shape: tuple[int, int], tile: int, turned: bool = False
) -> Schedule:
    """The schedule of a product with a masked weight, made once for each state of its mask.

    Masks are told apart by their bits' tensor, its version counter, blocks and shape. While a CUDA
    graph is captured, lists are made anew, within it: its replays follow bits that change.

    Args:
        bits, block, shape: as of :class:`slimkern.ops.BlockMask`.
        tile: outputs of a tile; a power of two, at least ``STEP``.
        turned: the reduction is over the weight's rows, as in dx = dy @ W, not over its columns.
    """
    known = _look_up(bits, block, shape)
    if (tile, turned) not in known.schedules:
        known.schedules[tile, turned] = _listed(known.flags, tile, turned)
    return known.schedules[tile, turned]


def kept_share(
    bits: Tensor, block: tuple[int, int], shape: tuple[int, int], tile: int, turned: bool = False
) -> float | None:
    """The share of steps that a product goes through; 1 where there is none.

    The first call for each state of a mask waits for the device. While a CUDA graph is captured,
    nothing may wait: then it is what is known from before, or None.

    Args:
        bits, block, shape, tile, turned: as of :func:`schedule`.
    """
    if _capturing(bits):
        known = None if bits.is_inference() else _known.get(bits)
        if known is None or known.state != _state(bits, block, shape):
            return None
        found = known.schedules.get((tile, turned))
        return None if found is None else found.share
    made = schedule(bits, block, shape, tile, turned)
    if made.share is None:
        every = made.steps.numel()
        made.share = int(made.counts.sum()) / every if every else 1.0
    return made.share


def _look_up(bits: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> _Known:
    if bits.is_inference() or _capturing(bits):
        return _Known((), 0, _flags(bits, block, shape))
    # Another stream could read a list before this one has written it: each has its own.
    stream = torch.cuda.current_stream(bits.device).cuda_stream if bits.is_cuda else 0
    known = _known.get(bits)
    state = _state(bits, block, shape)
    if known is None or (known.state, known.stream) != (state, stream):
        known = _Known(state, stream, _flags(bits, block, shape))
        _known[bits] = known
    return known


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _flags(bits: Tensor, block: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Which squares of the weight, ``STEP`` a side, keep anything: uint8 [rows, columns]."""
    (N, K), bits = shape, bits.contiguous()
    rows, columns = triton.cdiv(N, STEP), triton.cdiv(K, STEP)
    flags = torch.empty((rows, columns), dtype=torch.uint8, device=bits.device)
    if flags.numel():
        with on_device(bits):
            _flags_kernel[(rows, triton.cdiv(columns, _STEPS_AT_ONCE))](
                bits, flags,
                N, K, *block, bits.stride(0), flags.stride(0),
                STEP=STEP, STEPS=_STEPS_AT_ONCE, num_warps=4,
            )  # fmt: skip
    return flags


def _listed(flags: Tensor, tile: int, turned: bool) -> Schedule:
    flags = flags.t() if turned else flags
    squares, steps = flags.shape
    tiles = triton.cdiv(squares * STEP, tile)
    listed = torch.empty((tiles, steps), dtype=torch.int32, device=flags.device)
    counts = torch.empty((tiles,), dtype=torch.int32, device=flags.device)
    if tiles:
        with on_device(flags):
            _list_kernel[(tiles,)](
                flags, listed, counts,
                squares, steps, *flags.stride(),
                SQUARES=tile // STEP, BLOCK=_LIST_BLOCK, num_warps=4,
            )  # fmt: skip
    return Schedule(listed, counts)


def masked_copy(
    weight: Tensor, bits: Tensor, block: tuple[int, int], out: Tensor | None = None
) -> Tensor:
    """``W ∘ mask`` in new memory, [N, K]; what is masked is not read.

    Args:
        weight: [N, K], any strides.
        bits, block: as of :class:`slimkern.ops.BlockMask`.
        out: where the copy goes, [N, K] of any strides; ``weight`` itself is masked in place.
    """
    N, K = weight.shape
    out = torch.empty((N, K), dtype=weight.dtype, device=weight.device) if out is None else out
    bits = bits.contiguous()
    if out.numel():
        with on_device(weight):
            _copy_kernel[(triton.cdiv(K, 128), triton.cdiv(N, 32))](
                weight, bits, out,
                N, K, *block,
                *weight.stride(), bits.stride(0), *out.stride(),
                IN_PLACE=out is weight, BLOCK_N=32, BLOCK_K=128, num_warps=4,
            )  # fmt: skip
    return out
