"""``block_masked_linear`` on GPUs: a product goes through the steps in which a tile keeps weights.

The equations are those of ``reference.py``. ``M`` is the number of tokens, ``P`` that of outputs
and ``R`` the length of the reduction: (N, K) of the weight forward, (K, N) for dx. A tile of
outputs has a list of the steps of its reduction that hold any weight (``_block_tiles.py``); what is
in no list is neither read nor multiplied. There are three ways, and all give zero weights, never
their values, where the mask says so:

* few tokens: the mask is applied to each tile of the weight as it is loaded;
* many tokens: each tile of the weight is read many times, so it is masked once, in a copy;
* a mask that leaves something almost everywhere: nothing can be skipped, so that the copy goes to
  the plain matrix product.

No atomics, and every sum is one program's: results are the same from run to run.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code has no Python types: its arguments are pointers, tensors or constants by turns.

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from slimkern.ops._block_tiles import STEP, kept_share, kept_tile, masked_copy, schedule
from slimkern.ops._tile import (
    Tile,
    alignment,
    bucket,
    check_dtype,
    choose_tile,
    dot,
    launch_options,
    load_tile,
    offsets,
    on_device,
    precision,
    store_tile,
    swizzle,
    with_alignment,
)


@triton.jit
def _next_steps(list_ptr, count, offs, STEP: tl.constexpr):
    """The steps in which the positions ``offs`` of a tile's list lie; 0 behind its end."""
    place = offs // STEP
    return tl.load(list_ptr + place, mask=place < count, other=0)


@triton.jit
def _positions(steps, offs, STEP: tl.constexpr):
    """Positions in the full reduction of the positions ``offs`` of a list."""
    # At least 16 neighbours (half a step, where a tile is no wider) are contiguous and start at a
    # multiple of 16: loads may be wide.
    full = steps.to(tl.int64) * STEP + offs % STEP
    return tl.max_contiguous(tl.multiple_of(full, 16), 16)


@triton.jit
def _block_masked_product_kernel(
    x_ptr, w_ptr, b_ptr, bits_ptr, list_ptr, counts_ptr, y_ptr,
    M, P, R, steps, bn, bk,
    stride_xm, stride_xr, stride_wp, stride_wr, stride_b, stride_bits, stride_ym,
    HAS_BIAS: tl.constexpr, MASKED: tl.constexpr, TURNED: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One ``[BLOCK_M, BLOCK_P]`` tile of ``y = x @ V^T + b``, V [P, R] the masked weight.

    With ``MASKED`` the weight is as the user has it, and its bits are applied; else it is masked
    already. ``TURNED``: V is the transpose of the weight that the bits speak of.
    """
    R = with_alignment(R, ALIGN)
    stride_xm = with_alignment(stride_xm, ALIGN)
    stride_ym = with_alignment(stride_ym, ALIGN)
    pid_m, pid_p = swizzle(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(P, BLOCK_P), GROUP)
    offs_m = offsets(pid_m, BLOCK_M)
    offs_p = offsets(pid_p, BLOCK_P)
    mask_m = offs_m < M
    mask_p = offs_p < P
    count = tl.load(counts_ptr + pid_p)
    list_ptr += pid_p.to(tl.int64) * steps

    acc = tl.zeros((BLOCK_M, BLOCK_P), dtype=tl.float32)
    # Steps are fetched a round ahead: loads that wait for loads would take a stage of the pipeline.
    offs = tl.arange(0, BLOCK_R)
    listed = _next_steps(list_ptr, count, offs, STEP)
    for _ in range(tl.cdiv(count * STEP, BLOCK_R)):
        offs_r = _positions(listed, offs, STEP)
        mask_r = (offs // STEP < count) & (offs_r < R)
        offs += BLOCK_R
        listed = _next_steps(list_ptr, count, offs, STEP)
        x_tile = load_tile(x_ptr, offs_m, stride_xm, mask_m, offs_r, stride_xr, mask_r)
        if MASKED:
            if TURNED:
                kept = kept_tile(
                    bits_ptr, stride_bits, offs_r, mask_r, offs_p, mask_p, bn, bk, K_FIRST=False
                )
            else:
                kept = kept_tile(
                    bits_ptr, stride_bits, offs_p, mask_p, offs_r, mask_r, bn, bk, K_FIRST=True
                )
            pointers = w_ptr + (offs_r * stride_wr)[:, None] + (offs_p * stride_wp)[None, :]
            inside_w = mask_r[:, None] & mask_p[None, :]
            w_tile = tl.load(pointers, mask=inside_w & kept, other=0.0)
        else:
            w_tile = load_tile(w_ptr, offs_r, stride_wr, mask_r, offs_p, stride_wp, mask_p)
        acc = dot(x_tile, w_tile, acc, PRECISION)

    if HAS_BIAS:
        acc += tl.load(b_ptr + offs_p * stride_b, mask=mask_p, other=0.0).to(tl.float32)[None, :]
    store_tile(y_ptr, acc, offs_m, stride_ym, mask_m, offs_p, 1, mask_p)


@triton.jit
def _block_masked_dw_kernel(
    gy_ptr, x_ptr, bits_ptr, list_ptr, counts_ptr, out_ptr,
    M, N, K, steps, bn, bk,
    stride_gm, stride_gn, stride_xm, stride_xk, stride_bits, stride_on,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, STEP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``(dy^T x) ∘ mask`` for ``BLOCK_N`` outputs and ``BLOCK_K / STEP`` steps of their list.

    The list is followed to its end: steps that keep nothing are zeros, written without a product.
    """
    K = with_alignment(K, ALIGN)
    stride_gm = with_alignment(stride_gm, ALIGN)
    stride_xm = with_alignment(stride_xm, ALIGN)
    stride_on = with_alignment(stride_on, ALIGN)
    num_k = tl.cdiv(steps * STEP, BLOCK_K)
    pid_n, pid_k = swizzle(tl.program_id(0), tl.cdiv(N, BLOCK_N), num_k, GROUP)
    offs_n = offsets(pid_n, BLOCK_N)
    mask_n = offs_n < N
    count = tl.load(counts_ptr + pid_n)
    list_ptr += pid_n.to(tl.int64) * steps
    place = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_k = _positions(_next_steps(list_ptr, steps, place, STEP), place, STEP)
    written = (place // STEP < steps) & (offs_k < K)
    mask_k = written & (place // STEP < count)

    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    tokens = tl.where(pid_k * BLOCK_K < count * STEP, M, 0)
    for block in range(tl.cdiv(tokens, BLOCK_M)):
        offs_m = offsets(block, BLOCK_M)
        mask_m = offs_m < M
        gy_tile = load_tile(gy_ptr, offs_n, stride_gn, mask_n, offs_m, stride_gm, mask_m)
        x_tile = load_tile(x_ptr, offs_m, stride_xm, mask_m, offs_k, stride_xk, mask_k)
        acc = dot(gy_tile, x_tile, acc, PRECISION)

    kept = kept_tile(bits_ptr, stride_bits, offs_n, mask_n, offs_k, mask_k, bn, bk, K_FIRST=False)
    acc = tl.where(kept, acc, 0.0)
    store_tile(out_ptr, acc, offs_n, stride_on, mask_n, offs_k, 1, written)


# From the largest to the smallest; at most 96 KiB of shared memory each. The outputs of a tile are
# those of a list: wider tiles find fewer steps to leave out, so they are long in tokens instead.
_OUTPUTS = 64
_HALF_TILES = (
    Tile(256, _OUTPUTS, 32, warps=8, stages=4),
    Tile(128, _OUTPUTS, 64, warps=4, stages=3),
    Tile(64, _OUTPUTS, 64, warps=4, stages=4),
    Tile(16, _OUTPUTS, 64, warps=4, stages=4),
)
_FLOAT_TILES = (
    Tile(64, _OUTPUTS, 16, warps=8, stages=2),  # deeper, sm_80 has no registers for it
    Tile(32, _OUTPUTS, 16, warps=4, stages=4),
    Tile(16, _OUTPUTS, 16, warps=4, stages=4),
)
# A tile that is masked as it is loaded has its bits in registers too.
_HALF_LOADED_TILES = (Tile(64, _OUTPUTS, 64, 8, stages=4), Tile(32, _OUTPUTS, 32, 8, stages=4))
_FLOAT_LOADED_TILES = _FLOAT_TILES[1:]
_HALF_DW_TILES = (
    Tile(_OUTPUTS, 256, 32, warps=8, stages=3),
    Tile(_OUTPUTS, 128, 64, warps=4, stages=3),
)
_FLOAT_DW_TILES = (Tile(_OUTPUTS, 64, 16, warps=4, stages=3),)
_GROUP = 8  # rows of tiles per group of the swizzle
# Where each way begins is reasoned, not measured: a product of gathered tiles is expected to reach
# about half of cuBLAS's rate, so a list has to leave out half of the steps; and applying bits to a
# tile costs about as much for four tiles of tokens as writing a masked copy.
_MOST_KEPT = 0.5  # of all steps; above, going through a list is slower than a plain product
_FEW_TOKENS = 256  # up to so many, the weight is masked while it is loaded
_LEAST_PROGRAMS = 128  # of dW by lists, whose tokens are not cut into slices; a large GPU's worth


def block_masked_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, bits: Tensor, bn: int, bk: int
) -> Tensor:
    """y = x @ (W ∘ mask)ᵀ + b: x [M, K] -> y [M, N], any strides.

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    return _product(x, weight, bias, bits, (bn, bk), turned=False)


def block_masked_linear_dx(
    grad_y: Tensor, weight: Tensor, bits: Tensor, bn: int, bk: int
) -> Tensor:
    """dx = dy @ (W ∘ mask): dy [M, N] -> dx [M, K], any strides.

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    return _product(grad_y, weight, None, bits, (bn, bk), turned=True)


def block_masked_linear_dw(
    grad_y: Tensor, x: Tensor, bits: Tensor, bn: int, bk: int, N: int, K: int
) -> Tensor:
    """dW = (dyᵀ x) ∘ mask: dy [M, N], x [M, K] -> [N, K] in the dtype of x, any strides.

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    check_dtype("x", x)
    block, M = (bn, bk), x.shape[0]
    tile = choose_tile(_FLOAT_DW_TILES if x.dtype == torch.float32 else _HALF_DW_TILES, N, K)
    steps = triton.cdiv(K, STEP)
    programs = triton.cdiv(N, tile.a) * triton.cdiv(steps * STEP, tile.b)
    # In tf32 matrix units want both operands along the reduction, and here neither lies that way.
    turns = precision(x.dtype) == "tf32"
    if turns or programs < _LEAST_PROGRAMS or _is_dense(bits, block, (N, K)):
        grad_w = grad_y.t() @ x
        return masked_copy(grad_w, bits, block, out=grad_w)
    grad_w = torch.empty((N, K), dtype=x.dtype, device=x.device)
    if programs == 0:
        return grad_w
    listed, bits = schedule(bits, block, (N, K), _OUTPUTS), bits.contiguous()
    with on_device(x):
        _block_masked_dw_kernel[(programs,)](
            grad_y, x, bits, listed.steps, listed.counts, grad_w,
            M, N, K, steps, *block,
            *grad_y.stride(), *x.stride(), bits.stride(0), grad_w.stride(0),
            ALIGN=alignment(K, grad_y.stride(0), x.stride(0), grad_w.stride(0)),
            PRECISION=precision(x.dtype), STEP=STEP,
            BLOCK_N=tile.a, BLOCK_K=tile.b, BLOCK_M=tile.k, GROUP=_GROUP,
            **launch_options(tile),
        )  # fmt: skip
    return grad_w


def _is_dense(
    bits: Tensor, block: tuple[int, int], shape: tuple[int, int], turned: bool = False
) -> bool:
    """Whether a plain product is faster than going through lists."""
    share = kept_share(bits, block, shape, _OUTPUTS, turned)
    if share is None:  # in a CUDA graph of a mask never used before: blocks tell what is likely
        return min(block) < STEP
    return share > _MOST_KEPT


def _tiles(x: Tensor, few: bool) -> tuple[Tile, ...]:
    if x.dtype == torch.float32:
        return _FLOAT_LOADED_TILES if few else _FLOAT_TILES
    return _HALF_LOADED_TILES if few else _HALF_TILES


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bits: Tensor,
    block: tuple[int, int],
    turned: bool,
) -> Tensor:
    """x @ Vᵀ + b with V the masked weight [N, K], or its transpose: x [M, R] -> [M, P]."""
    check_dtype("x", x)
    N, K = weight.shape
    M, (P, R) = x.shape[0], ((K, N) if turned else (N, K))
    few = M <= _FEW_TOKENS
    if not few and _is_dense(bits, block, (N, K), turned):
        copy = masked_copy(weight, bits, block)
        return F.linear(x, copy.t() if turned else copy, bias)
    y = torch.empty((M, P), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if not few:
        weight = masked_copy(weight, bits, block)
    tile = choose_tile(_tiles(x, few), bucket(M), P)
    stride_wp, stride_wr = weight.stride()[::-1] if turned else weight.stride()
    listed, bits = schedule(bits, block, (N, K), _OUTPUTS, turned), bits.contiguous()
    with on_device(x):
        _block_masked_product_kernel[(triton.cdiv(M, tile.a) * triton.cdiv(P, tile.b),)](
            x, weight, bias, bits, listed.steps, listed.counts, y,
            M, P, R, listed.steps.shape[1], *block,
            *x.stride(), stride_wp, stride_wr,
            1 if bias is None else bias.stride(0), bits.stride(0), y.stride(0),
            HAS_BIAS=bias is not None, MASKED=few, TURNED=turned,
            ALIGN=alignment(R, x.stride(0), y.stride(0)),
            PRECISION=precision(x.dtype), STEP=STEP,
            BLOCK_M=tile.a, BLOCK_P=tile.b, BLOCK_R=tile.k, GROUP=_GROUP,
            **launch_options(tile),
        )  # fmt: skip
    return y
