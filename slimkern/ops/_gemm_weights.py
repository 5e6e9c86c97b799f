"""What surrounds a product with a full-size weight: its compact copy, and its gradient."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from slimkern.ops._gemm_configs import (
    COPY_TILE,
    DESCRIPTOR_TILES,
    GROUP,
    MULTIPLE,
    NARROW_TILES,
    describable,
    descriptor,
    has_descriptors,
    tiles_for,
    turns,
)
from slimkern.ops._gemm_descriptors import _dw_descriptor_kernel
from slimkern.ops._gemm_kernels import _gather_kernel, _product_dw_kernel, _scatter_sum_kernel
from slimkern.ops._launch import launch
from slimkern.ops._tile import (
    Tile,
    alignment,
    bucket,
    check_dtype,
    choose_tile,
    contiguous,
    launch_options,
    precision,
    processors,
    splits,
)
from slimkern.ops._tune import fastest


def padded(size: int, multiple: int = MULTIPLE) -> int:
    """``size`` rounded up to ``multiple``."""
    return -(-size // multiple) * multiple


# Which index vectors are one run of neighbours, where each begins, and of which version of its
# values that was read.
_runs: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _begin_of_run(index: Tensor) -> int | None:
    """The first entry of an index whose entries are neighbours, else None.

    Read once for each index, for which the host waits; never while a CUDA graph is captured, in
    which an index may be given other values later.
    """
    if index.is_meta or index.is_inference() or index.numel() == 0:
        return None
    if index.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    known = _runs.get(index)
    if known is None or known[0] != index._version:
        first, last = (int(entry) for entry in index[[0, -1]].tolist())
        known = (index._version, first if last - first == index.numel() - 1 else None)
        _runs[index] = known
    begin: int | None = known[1]
    return begin


def run_of(w: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor | None:
    """``W[rows][:, cols]`` as a view of w [N, K]; None where that is none, or none that is aligned.

    It is one where the kept rows and the kept columns are a run of neighbours each.
    """
    if rows is None and cols is None:
        return w
    view = w
    for dim, index in enumerate((rows, cols)):
        if index is None:
            continue
        begin = _begin_of_run(index)
        if begin is None:
            return None
        view = view.narrow(dim, begin, index.numel())
    return view if describable(view) else None


def kept_part(w: Tensor, rows: Tensor | None, cols: Tensor | None) -> Tensor:
    """``W[rows][:, cols]`` of w [N, K]: a view where `run_of` has one, else a compact copy."""
    view = run_of(w, rows, cols)
    if view is not None:
        return view
    R = w.shape[0] if rows is None else rows.shape[0]
    C = w.shape[1] if cols is None else cols.shape[0]
    return gathered(w, rows, cols)[:R, :C]


def gathered(
    w: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
    *,
    multiple: int = MULTIPLE,
    transposed: bool = False,
) -> Tensor:
    """The compact copy of ``W[rows][:, cols]``: one launch.

    Args:
        w: [N, K], any strides.
        rows, cols: int64, sorted, unique, or None for all.
        multiple: both sizes are rounded up to it; what is added is zero.
        transposed: [C', R'] instead of [R', C'].

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    check_dtype("w", w)
    rows, cols = contiguous(rows), contiguous(cols)
    R = w.shape[0] if rows is None else rows.shape[0]
    C = w.shape[1] if cols is None else cols.shape[0]
    shape = (padded(R, multiple), padded(C, multiple))
    out = torch.empty(shape[::-1] if transposed else shape, dtype=w.dtype, device=w.device)
    if out.numel() == 0:
        return out
    tile = COPY_TILE
    grid = (triton.cdiv(shape[0], tile.a), triton.cdiv(shape[1], tile.b))
    launch(_gather_kernel, grid, w)(
        w, rows, cols, out,
        R, C, *shape, *w.stride(), *(out.stride()[::-1] if transposed else out.stride()),
        HAS_ROWS=rows is not None, HAS_COLS=cols is not None,
        BLOCK_R=tile.a, BLOCK_C=tile.b,
        **launch_options(tile),
    )  # fmt: skip
    return out


def product_dw(
    gy: Tensor,
    x: Tensor,
    *,
    out: Tensor | None = None,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
    shape: tuple[int, int] | None = None,
) -> Tensor:
    """``dW[rows[r], cols[c]] = (gy^T x)[r, c]``, zero elsewhere: gy [M, R], x [M, C] -> [N, K].

    Where the kept part has few tiles, the tokens are cut into slices that are summed afterwards,
    always in the same order.

    Args:
        gy, x: any strides.
        out: [N, K] to write to, of any floating dtype, neighbours in a row side by side; or None.
        rows, cols: int64, sorted, unique; None where all are kept.
        shape: ``(N, K)``; None for ``out``'s, or ``(R, C)``.

    Raises:
        TypeError: a dtype other than float32, float16 or bfloat16.
    """
    check_dtype("x", x)
    rows, cols = contiguous(rows), contiguous(cols)
    R, C = gy.shape[1], x.shape[1]
    grad = torch.empty(shape or (R, C), dtype=x.dtype, device=x.device) if out is None else out
    if R == 0 or C == 0:
        return grad.zero_()
    _run_dw(gy, x, rows, cols, grad)
    return grad


def _run_dw(gy: Tensor, x: Tensor, rows: Tensor | None, cols: Tensor | None, grad: Tensor) -> None:
    """The launches of `product_dw`: the sums of each slice, and what adds and spreads them."""
    (M, R), C = gy.shape, x.shape[1]
    exactness = precision(x.dtype)
    by_descriptor = M > 0 and has_descriptors(x) and describable(gy) and describable(x)
    align = alignment(R, C, gy.stride(0), x.stride(0))
    if rows is None and cols is None:
        align = alignment(align, grad.stride(0))  # what tiles are written to, where not in slices
    tiles = DESCRIPTOR_TILES[1:] if by_descriptor else tiles_for(x, align)
    if tiles is NARROW_TILES:
        tiles = tiles[1:]  # both operands are narrow here: the largest tile would spill

    def attempt(tile: Tile) -> None:
        programs, steps = triton.cdiv(R, tile.a) * triton.cdiv(C, tile.b), triton.cdiv(M, tile.k)
        S = splits(programs, steps)
        chunk = triton.cdiv(steps, S) * tile.k
        direct = S == 1 and rows is None and cols is None
        part = grad[None]
        if not direct:
            kind = torch.float32 if S > 1 else grad.dtype
            part = torch.empty((S, R, padded(C, 16)), dtype=kind, device=x.device)
        options = {"BLOCK_R": tile.a, "BLOCK_C": tile.b, "BLOCK_M": tile.k, "GROUP": GROUP}
        options |= launch_options(tile)
        if by_descriptor:
            launch(_dw_descriptor_kernel, (min(programs * S, processors(x)),), x)(
                descriptor(gy, tile.k, tile.a), descriptor(x, tile.k, tile.b), part,
                M, R, C, S, chunk, *part.stride()[:2], PRECISION=exactness, **options,
            )  # fmt: skip
        else:
            launch(_product_dw_kernel, (programs, S), x)(
                gy, x, part,
                M, R, C, chunk,
                *gy.stride(), *x.stride(), *part.stride()[:2],
                ALIGN=align, TAIL=M % tile.k != 0, PRECISION=exactness,
                TURN=turns(x, tile, exactness), **options,
            )  # fmt: skip
        if not direct:
            scatter_sum(part, R, C, rows, cols, grad)

    tile = choose_tile(tiles, R, C, slices=splits(1, triton.cdiv(bucket(M), tiles[0].k)))
    spread = (rows is None, cols is None, grad.dtype)
    sizes = (bucket(M), R, C, align, by_descriptor, exactness, *spread)
    attempt(fastest("gradient of a weight", sizes, x, tiles, tile, attempt))


def scatter_sum(
    part: Tensor, R: int, C: int, rows: Tensor | None, cols: Tensor | None, out: Tensor
) -> None:
    """Writes all of out [N, K]: the slices part [S, R, >= C], added in their order, and zeros."""
    N, K = out.shape
    block_k = min(COPY_TILE.b, bucket(K))
    launch(_scatter_sum_kernel, (triton.cdiv(N, COPY_TILE.a), triton.cdiv(K, block_k)), out)(
        part, rows, cols, out,
        part.shape[0], R, C, N, K, *part.stride()[:2], out.stride(0),
        HAS_ROWS=rows is not None, HAS_COLS=cols is not None,
        STEPS_R=R.bit_length(), STEPS_C=C.bit_length(),
        BLOCK_N=COPY_TILE.a, BLOCK_K=block_k,
        **launch_options(COPY_TILE),
    )  # fmt: skip
