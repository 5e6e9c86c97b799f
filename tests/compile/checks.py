"""What is demanded of a kernel's machine code."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from tests.compile.cases import Promise
from tests.compile.code import Figures
from tests.compile.matrix import Row
from tests.compile.targets import TARGETS, Target

LANE_MOVES = 0.05  # of a loop: scalar registers that spill go to vector ones, never to memory
TENSOR_MEMORY = 512  # columns of a multiprocessor of sm_100


def complaints(row: Row, promises: Mapping[str, Promise]) -> list[str]:
    """What is wrong with a row; empty where nothing is."""
    if row.error:
        return [f"{row}: {row.error}"]
    if row.kernel not in promises:
        return [f"{row}: KERNELS of its cases does not hold it"]
    assert row.figures is not None
    target, promise, figures = TARGETS[row.target], promises[row.kernel], row.figures
    found = [
        *_resources(figures, promise, target),
        *_matrix(row, figures, promise, target),
        *_loads(row, figures, promise, target),
    ]
    return [f"{row}: {text}" for text in found]


def never_launched(rows: Iterable[Row], existing: set[str]) -> set[str]:
    """Kernels that exist and that no case launches."""
    return existing - {row.kernel for row in rows}


def _resources(figures: Figures, promise: Promise, target: Target) -> Iterator[str]:
    if figures.spilled:
        yield f"spills {figures.spilled} bytes"
    if figures.loop.get("spill"):
        yield "local memory is used in its main loop"
    moves = figures.loop.get("lane move", 0)
    if moves > LANE_MOVES * sum(figures.loop.values()):
        yield f"{moves} instructions of its main loop move spilled scalar registers"
    if figures.shared > target.shared_block:
        yield f"takes {figures.shared} bytes of shared memory of {target.shared_block}"
    if figures.tensor_memory > TENSOR_MEMORY:
        yield f"takes {figures.tensor_memory} columns of tensor memory of {TENSOR_MEMORY}"
    blocks = target.blocks(figures.registers, figures.shared, figures.warps)
    wanted = max(promise.blocks, -(-promise.warps * 32 // target.warp // figures.warps))
    if blocks < wanted:
        yield (
            f"{blocks} blocks of {figures.warps} warps fit a multiprocessor, {wanted} are intended "
            f"({figures.registers} registers, {figures.shared} bytes of shared memory)"
        )


def _matrix(row: Row, figures: Figures, promise: Promise, target: Target) -> Iterator[str]:
    full_precision = row.dtype == "fp32" and target.backend == "cuda"
    if not promise.matrix or full_precision:
        if figures.matrix and full_precision:
            yield f"full float32 precision was asked for, but there is {figures.matrix}"
        return
    if not figures.matrix:
        yield "has no matrix instruction"
    elif _large(row) and row.itemsize == 2:
        old = [opcode for opcode in figures.matrix if not opcode.startswith(target.matrix)]
        if old:
            yield f"has {old}, where {target.matrix} is to do the work"


def _large(row: Row) -> bool:
    """Whether the tile is large enough for a warp group, and so for the newest instructions."""
    first, second, *_ = [*row.blocks().values(), 0, 0]
    return first >= 64 and second >= 32


def _loads(row: Row, figures: Figures, promise: Promise, target: Target) -> Iterator[str]:
    small = promise.matrix and _small_operand(row, figures, target)
    if promise.narrow or row.narrow or figures.tma or small:
        return
    wide = sum(count for size, count in figures.loads.items() if size >= 16)
    if not wide:
        yield f"has no 16-byte load in its main loop: {figures.loads}"
    if not promise.matrix:
        return
    narrow = {size: n for size, n in figures.loads.items() if size < 16}
    for size in row.indices:
        narrow.pop(size, None)
    if narrow:
        yield f"has loads narrower than 16 bytes in its main loop: {narrow}"


def _small_operand(row: Row, figures: Figures, target: Target) -> bool:
    """Whether an operand's tile has fewer than 16 bytes for each thread."""
    sizes = sorted(row.blocks().values())[:2]
    threads = figures.warps * target.warp
    return len(sizes) == 2 and sizes[0] * sizes[1] * row.itemsize < 16 * threads
