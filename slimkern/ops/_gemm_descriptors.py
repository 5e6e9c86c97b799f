"""Matrix products on tensor descriptors, which NVIDIA GPUs since Hopper load whole tiles by.

One thread asks for a tile and none computes addresses or masks: what lies beyond a tensor's sizes
arrives as zero and is not written. As many programs as the GPU has multiprocessors run through the
tiles, so that the loads of the next tile overlap the epilogue of the last. Rows must start on
16-byte boundaries; `_gemm.py` takes the pointer kernels where they do not.
"""

# mypy: disable-error-code="no-untyped-def"
# Device code has no Python types: its arguments are descriptors, tensors or constants by turns.

from __future__ import annotations

import triton
import triton.language as tl

from slimkern.ops._activations import activation_value
from slimkern.ops._gemm_kernels import load_bias
from slimkern.ops._tile import dot, gather_index, offsets, store_tile, swizzle


@triton.jit
def halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile."""
    pairs = tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2))
    return tl.split(tl.permute(pairs, (0, 2, 1)))


@triton.jit
def _finish(
    acc, first_m, first_n,
    y_desc, h_desc, add_desc, b_ptr, rows_ptr, y_ptr, M, N, stride_ym,
    HAS_ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """From a tile of sums to the tile of ``y`` (and of ``h``) at ``first_m, first_n``."""
    offs_n = offsets(0, BLOCK_N) + first_n
    mask_n = offs_n < N
    rows = gather_index(rows_ptr, offs_n, mask_n, HAS_ROWS)
    acc += load_bias(b_ptr, rows, mask_n, HAS_BIAS)
    if h_desc is not None:
        h_desc.store([first_m, first_n], acc.to(h_desc.dtype))
    acc = activation_value(acc, ACTIVATION)
    if add_desc is not None:
        acc += add_desc.load([first_m, first_n]).to(tl.float32)
    if y_desc is None:
        offs_m = offsets(0, BLOCK_M) + first_m
        store_tile(y_ptr, acc, offs_m, stride_ym, offs_m < M, offs_n, 1, mask_n)
    else:
        y_desc.store([first_m, first_n], acc.to(y_desc.dtype))


@triton.jit(do_not_specialize=["M", "N", "K", "stride_ym"])
def _product_descriptor_kernel(
    x_desc, w_desc, y_desc, h_desc, add_desc, b_ptr, rows_ptr, y_ptr,
    M, N, K, stride_ym,
    TRANSPOSED: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``y = a(h) + residual`` with ``h = x @ W^T + b[rows]``, tile after tile.

    ``TRANSPOSED`` says that the weight lies as ``[K, N]``. ``h_desc`` is None where ``h`` is not
    kept, ``add_desc`` where nothing is added, and ``y_desc`` where the rows of ``y`` start
    anywhere. ``SPLIT`` ends a tile in two halves, which takes fewer registers.
    """
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=True):
        pid_m, pid_n = swizzle(tile, num_m, num_n, GROUP)
        first_m = pid_m * BLOCK_M
        first_n = pid_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(steps):
            x_tile = x_desc.load([first_m, step * BLOCK_K])
            if TRANSPOSED:
                w_tile = w_desc.load([step * BLOCK_K, first_n])
            else:
                w_tile = w_desc.load([first_n, step * BLOCK_K]).T
            acc = dot(x_tile, w_tile, acc, PRECISION)

        if SPLIT:
            left, right = halves(acc, BLOCK_M, BLOCK_N)
            _finish(
                left, first_m, first_n,
                y_desc, h_desc, add_desc, b_ptr, rows_ptr, y_ptr, M, N, stride_ym,
                HAS_ROWS, HAS_BIAS, ACTIVATION, BLOCK_M, BLOCK_N // 2,
            )  # fmt: skip
            _finish(
                right, first_m, first_n + BLOCK_N // 2,
                y_desc, h_desc, add_desc, b_ptr, rows_ptr, y_ptr, M, N, stride_ym,
                HAS_ROWS, HAS_BIAS, ACTIVATION, BLOCK_M, BLOCK_N // 2,
            )  # fmt: skip
        else:
            _finish(
                acc, first_m, first_n,
                y_desc, h_desc, add_desc, b_ptr, rows_ptr, y_ptr, M, N, stride_ym,
                HAS_ROWS, HAS_BIAS, ACTIVATION, BLOCK_M, BLOCK_N,
            )  # fmt: skip


@triton.jit
def _finish_gated(
    gate, up, first_m, first_n,
    y_desc, gate_bias_ptr, up_bias_ptr, y_ptr, M, N, stride_ym,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """From two tiles of sums to the tile of ``y`` at ``first_m, first_n``."""
    offs_n = offsets(0, BLOCK_N) + first_n
    mask_n = offs_n < N
    gate += load_bias(gate_bias_ptr, offs_n, mask_n, HAS_BIAS)
    up += load_bias(up_bias_ptr, offs_n, mask_n, HAS_BIAS)
    y = activation_value(gate, ACTIVATION) * up
    if y_desc is None:
        offs_m = offsets(0, BLOCK_M) + first_m
        store_tile(y_ptr, y, offs_m, stride_ym, offs_m < M, offs_n, 1, mask_n)
    else:
        y_desc.store([first_m, first_n], y.to(y_desc.dtype))


@triton.jit(do_not_specialize=["M", "N", "K", "stride_ym"])
def _gated_descriptor_kernel(
    x_desc, gate_desc, up_desc, y_desc, gate_bias_ptr, up_bias_ptr, y_ptr,
    M, N, K, stride_ym,
    HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``a(x @ Wg^T + bg) * (x @ Wu^T + bu)``: each tile of ``x`` is loaded once."""
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=True):
        pid_m, pid_n = swizzle(tile, num_m, num_n, GROUP)
        first_m = pid_m * BLOCK_M
        first_n = pid_n * BLOCK_N
        gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for step in range(steps):
            x_tile = x_desc.load([first_m, step * BLOCK_K])
            gate = dot(x_tile, gate_desc.load([first_n, step * BLOCK_K]).T, gate, PRECISION)
            up = dot(x_tile, up_desc.load([first_n, step * BLOCK_K]).T, up, PRECISION)

        # In halves: two tiles of sums and what is made of them would take too many registers.
        gate_left, gate_right = halves(gate, BLOCK_M, BLOCK_N)
        up_left, up_right = halves(up, BLOCK_M, BLOCK_N)
        _finish_gated(
            gate_left, up_left, first_m, first_n,
            y_desc, gate_bias_ptr, up_bias_ptr, y_ptr, M, N, stride_ym,
            HAS_BIAS, ACTIVATION, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip
        _finish_gated(
            gate_right, up_right, first_m, first_n + BLOCK_N // 2,
            y_desc, gate_bias_ptr, up_bias_ptr, y_ptr, M, N, stride_ym,
            HAS_BIAS, ACTIVATION, BLOCK_M, BLOCK_N // 2,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "R", "C", "S", "chunk"])
def _dw_descriptor_kernel(
    gy_desc, x_desc, out_ptr,
    M, R, C, S, chunk, stride_os, stride_on,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``grad_y^T @ x`` over each of ``S`` slices of ``chunk`` tokens, tile after tile.

    Slices are whole blocks of tokens, so that none reads what the next one sums.
    """
    num_r = tl.cdiv(R, BLOCK_R)
    num_c = tl.cdiv(C, BLOCK_C)
    tiles = num_r * num_c
    for number in tl.range(tl.program_id(0), tiles * S, tl.num_programs(0), flatten=True):
        piece = number // tiles
        pid_r, pid_c = swizzle(number % tiles, num_r, num_c, GROUP)
        first_r = pid_r * BLOCK_R
        first_c = pid_c * BLOCK_C
        begin = piece * chunk
        steps = tl.cdiv(tl.maximum(tl.minimum(chunk, M - begin), 0), BLOCK_M)
        acc = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
        for step in range(steps):
            gy_tile = gy_desc.load([begin + step * BLOCK_M, first_r])
            x_tile = x_desc.load([begin + step * BLOCK_M, first_c])
            acc = dot(gy_tile.T, x_tile, acc, PRECISION)
        offs_r = offsets(pid_r, BLOCK_R)
        offs_c = offsets(pid_c, BLOCK_C)
        base = out_ptr + tl.cast(piece, tl.int64) * stride_os
        store_tile(base, acc, offs_r, stride_on, offs_r < R, offs_c, 1, offs_c < C)
