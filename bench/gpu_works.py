"""What is measured on a GPU: at which shapes, in which precisions, replayed or launched.

BERT-base's sizes, at the sparsities 80 and 50 % and at widths that are no multiple of anything
(614 of 3072 channels); a large linear besides, where the matrix units are the limit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from torch import Tensor, nn

from bench import counts, model_works, op_works, training_cases
from bench.gpu_modules import LinearPart, MaskedFfn, Part
from bench.model_works import BGE_BASE, TINY, UNEVEN_HEADS, Cut, even
from bench.modules import randomize
from bench.op_cases import BlockCase, Case
from bench.op_works import kept_index, normal
from bench.slims import SlimBuild
from bench.work import Work
from slimkern.report.speed_schema import Precision

Mode = Literal["graph", "launched"]
Extent = Literal["full", "quick", "smoke"]
LAUNCHED = ", launched"
"""At the end of a work's name: every kernel is launched from Python, as without a CUDA graph."""

# The kept channels of twelve layers, 7,680 in all as 12 x 640, none a multiple of 32.
UNEVEN_FFN = (603, 895, 705, 805, 1025, 741, 641, 577, 513, 461, 393, 321)
PARTS: tuple[Part, ...] = ("fwd", "dx", "dW")
_HALF: tuple[Precision, ...] = ("bf16",)


@dataclass(frozen=True)
class Item:
    """A piece of work and how it is measured.

    Attributes:
        work: whose ``before``, where there is one, is done in the same rounds.
        precisions: in this order.
        modes: ``graph``, replays of a CUDA graph; ``launched``, each call from Python.
        checked_only: compared with fp64 and not timed.
    """

    work: Work
    precisions: tuple[Precision, ...] = _HALF
    modes: tuple[Mode, ...] = ("graph",)
    checked_only: bool = False


def items(extent: Extent) -> list[Item]:
    """All that is measured, in its order: what is checked only, then from whole models down to
    single operations, so that what a run has no time for is small.

    Args:
        extent: ``full``; ``quick``, about a tenth of it; ``smoke``, tiny and of odd sizes.
    """
    if extent == "smoke":
        return [*_checks(((9, 33, 40),))[::3], *_smoke()]
    if extent == "quick":
        return [*_checks(((17, 63, 130),))[::2], *_quick()]
    return [*_checks(((17, 63, 130), (300, 70, 600))), *_full()]


def _smoke() -> Iterator[Item]:
    yield from _models(TINY, (None, Cut("slim", (31, 17), (1, 2))), ((2, 9),), (), ("fp32",))
    yield from _steps(_TINY_STEP, (0.8,), ("fp32",))
    yield from _layers(TINY, (31, 1), ((2, 9),), ("fp32",))
    yield from _linears((9,), ((40, 70, 21, None), (40, 70, None, 45)), ("fp32",))
    yield from _ffns(24, 51, (13,), (7,), (), ("fp32",))
    yield from _masked_ffns(24, 51, (13,), (7,), ("fp32",))
    yield from _blocks((BlockCase(9, 40, 70, (32, 32), 0.5),), ("fp32",))


def _quick() -> Iterator[Item]:
    yield from _linears((4096,), ((3072, 768, 614, None), (768, 3072, None, 640)), _HALF)
    yield from _blocks((BlockCase(4096, 3072, 768, (32, 32)),), _HALF)
    yield from _masked_ffns(768, 3072, (640,), (4096,), _HALF)
    yield from _models(BGE_BASE, (_SLIM,), ((8, 128),), (), _HALF)
    yield from _steps(TRAINED, (0.8,), _HALF)
    yield from _layers(BGE_BASE, (640, 5), ((32, 128),), _HALF)
    yield from _ffns(768, 3072, (640,), (4096,), (4096,), _HALF)


def _full() -> Iterator[Item]:
    shapes = ((8, 128), (32, 128), (1, 128))
    uneven = Cut("slim uneven", UNEVEN_FFN, UNEVEN_HEADS)
    yield from _models(BGE_BASE, (None, _SLIM, uneven), shapes, ((32, 128),), _HALF)
    yield from _steps(TRAINED, (0.0, 0.25, 0.5, 0.8), _HALF)
    yield from _layers(BGE_BASE, (640, 5), ((8, 128), (32, 128)), _HALF)
    wide, narrow = (3072, 768), (768, 3072)
    tall = [(*wide, r, None) for r in (614, 640, 1536)]
    flat = [(*narrow, None, c) for c in (614, 640, 1536)]
    yield from _linears((1024, 4096), [*tall, *flat, (768, 768, 320, None)], _HALF)
    yield from _ffns(768, 3072, (614, 640), (1024, 4096), (4096,), _HALF)
    yield from _masked_ffns(768, 3072, (640, 1536), (1024, 4096), _HALF)
    blocks = [((32, 32), 0.2), ((32, 32), 0.5), ((4, 1), 0.2), ((4, 1), 0.5)]
    yield from _blocks([BlockCase(4096, *wide, *kind) for kind in blocks], _HALF)
    yield from _blocks([BlockCase(16384, 4096, 4096, (32, 32), s) for s in (0.2, 0.5)], _HALF)
    large = [(4096, 4096, 2048, None), (4096, 4096, None, 2048)]
    yield from _linears((16384,), large, _HALF, compiled=False)
    yield from _linears((4096,), [tall[1], flat[1]], ("fp32-high", "fp32"), compiled=False)


_TINY_STEP = training_cases.Size(1, 32, 4, 48, 20, batch=1, tokens=5, multiple_of=4)
_SLIM = even("slim", BGE_BASE, 640, 5)
TRAINED = training_cases.Size(
    layers=12, width=768, heads=12, ffn=3072, vocabulary=30522, batch=32, tokens=128
)
"""What a step trains: BERT-base's shape."""


def _checks(shapes: Sequence[tuple[int, int, int]]) -> list[Item]:
    """Awkward shapes of the operations in bfloat16, the first thing that is done."""
    works: list[Work] = []
    for M, N, K in shapes:
        for R, C in ((max(1, N // 3), None), (None, max(1, K // 3)), (None, None)):
            works += [_linear(part, M, N, K, R, C) for part in PARTS]
        for block in ((32, 32), (4, 1), (1, 1)):
            works.append(op_works.block_work(BlockCase(M, N, K, block, 0.5), smoke=True))
        works.append(_masked_ffn(K, N, max(1, N // 3), M, backward=True))
    return [Item(replace(work, name=f"{work.name} check"), checked_only=True) for work in works]


def _build_linear(part: Part, N: int, K: int, R: int | None, C: int | None) -> nn.Module:
    return randomize(LinearPart(part, N, K, kept_index(R, N), kept_index(C, K)))


def _normals(name: str, *shapes: tuple[int, int]) -> tuple[Tensor, ...]:
    return tuple(normal(f"{name} {i}", *shape) for i, shape in enumerate(shapes))


def _linear(
    part: Part, M: int, N: int, K: int, R: int | None, C: int | None, compiled: bool = False
) -> Work:
    """One product of a linear [N, K] of which R rows and C columns are kept."""
    kept = "".join(f", {n} {what}" for n, what in ((R, "rows"), (C, "cols")) if n)
    name = f"indexed linear {K}->{N}{kept} {part}"
    rows, cols = N if R is None else R, K if C is None else C
    # depth: what is summed over
    depth, shapes = {
        "fwd": (cols, [(M, cols)]),
        "dx": (rows, [(M, rows)]),
        "dW": (M, [(M, rows), (M, cols)]),
    }[part]
    weight = 0 if part == "dW" else rows * cols
    output = {"fwd": M * rows, "dx": M * cols, "dW": N * K}[part]
    moved = sum(a * b for a, b in shapes) + weight + output
    count = counts.Count(2.0 * M * rows * cols, moved, roundings=depth + 1, stores=2)
    return Work(
        level="op",
        name=name,
        shape=f"M={M}",
        build=partial(_build_linear, part, N, K, R, C),
        inputs=partial(_normals, name, *shapes),
        **counts.figures(count, 0),
        compiled=compiled,
        tags=frozenset({"part"}),
    )


def _linears(
    rows: Sequence[int],
    kinds: Sequence[tuple[int, int, int | None, int | None]],
    precisions: tuple[Precision, ...],
    compiled: bool = True,
) -> Iterator[Item]:
    """(N, K, R, C) at every M and for every product.

    On the short lists: the first kind at the last M, to be compiled its forward alone.
    """
    for kind in kinds:
        for M in rows:
            for part in PARTS:
                listed = compiled and rows[-1] == M and kind == kinds[0]
                work = _linear(part, M, *kind, compiled=listed and part == "fwd")
                whole = _linear(part, M, *kind[:2], None, None)
                tags = work.tags | {"tuned"} if listed else work.tags
                yield Item(replace(work, before=whole, tags=tags), precisions)


def _blocks(cases: Sequence[BlockCase], precisions: tuple[Precision, ...]) -> Iterator[Item]:
    for case in cases:
        dense = Case((case.M,), case.N, case.K, backward=True)
        for before, backward in zip(op_works.linear_works(dense, smoke=False), (False, True)):
            work = op_works.block_work(case, smoke=False, backward=backward)
            yield Item(replace(work, before=before), precisions)


def _ffns(
    H: int,
    channels: int,
    widths: Sequence[int],
    rows: tuple[int, ...],
    compiled: tuple[int, ...],
    precisions: tuple[Precision, ...],
) -> Iterator[Item]:
    """For inference, cut; the first width is compiled too."""
    whole = op_works.ffn_works(H, channels, None, rows)
    for width in widths:
        listed = compiled if width == widths[0] else ()
        works = op_works.ffn_works(H, channels, width, rows, compiled=listed)
        for work, before in zip(works, whole):
            yield Item(replace(work, before=before), precisions)


def _build_masked_ffn(H: int, channels: int, width: int) -> nn.Module:
    keep = kept_index(width, channels)
    assert keep is not None
    return randomize(MaskedFfn(H, channels, keep))


def _masked_ffn(H: int, channels: int, width: int, M: int, backward: bool) -> Work:
    name = f"masked FFN {H}->{channels}, {width} kept"
    count = counts.ffn(M, H, width)
    written = 2 * H * channels + channels + 3 * H  # gradients have full size
    figures = counts.figures(count, 2 * M * H, M if backward else 0, written)
    return Work(
        level="op",
        name=name + backward * " fwd+bwd",
        shape=f"M={M}",
        build=partial(_build_masked_ffn, H, channels, width),
        inputs=partial(_normals, name, (M, H)),
        **figures,
        backward=backward,
        tags=frozenset({"masked ffn"}),
    )


def _masked_ffns(
    H: int,
    channels: int,
    widths: Sequence[int],
    rows: Sequence[int],
    precisions: tuple[Precision, ...],
) -> Iterator[Item]:
    for width in widths:
        for M in rows:
            (before,) = op_works.ffn_works(H, channels, None, (M,), backward=(M,))[1:]
            work = _masked_ffn(H, channels, width, M, backward=True)
            yield Item(replace(work, before=before), precisions)


def _layers(
    size: model_works.Size,
    kept: tuple[int, int],
    shapes: tuple[model_works.Shape, ...],
    precisions: tuple[Precision, ...],
) -> Iterator[Item]:
    for work in model_works.layer_at(size, kept, shapes):
        yield Item(replace(work, compiled=work.shape == "32x128"), precisions)


def _steps(
    size: training_cases.Size, sparsities: Sequence[float], precisions: tuple[Precision, ...]
) -> Iterator[Item]:
    for sparsity in sparsities:
        work = training_cases.step(size, sparsity, optimizer=True)
        yield Item(replace(work, compiled=False), precisions, ("graph", "launched"))


def _ids(work: Work) -> tuple[Tensor, ...]:
    """The tokens without their mask of ones: nothing is padding."""
    return work.inputs()[:1]


def _models(
    size: model_works.Size,
    cuts: Sequence[Cut | None],
    shapes: tuple[model_works.Shape, ...],
    compiled: tuple[model_works.Shape, ...],
    precisions: tuple[Precision, ...],
) -> Iterator[Item]:
    """Dense ones stand beside each cut (``before``), and alone where a cut is None."""
    for cut in cuts:
        for work in model_works.model_at(size, cut, shapes, compiled=compiled):
            before = work.before
            if before is not None:
                before = replace(before, inputs=partial(_ids, before))
            slim = isinstance(work.build, SlimBuild) and len(set(work.build.ffn)) == 1
            given = replace(
                work,
                inputs=partial(_ids, work),
                before=before,
                compiled=work.compiled and (cut is None or slim),
                tags=work.tags | {"tuned"} if work.compiled and slim else work.tags,
            )
            yield Item(given, precisions, ("graph", "launched"))
