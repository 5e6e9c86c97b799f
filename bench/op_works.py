"""Works of level op: linear, indexed and block-masked linear, FFN, attention block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from bench import counts
from bench.check import seed_of
from bench.modules import Attention, BlockMaskedLinear, Ffn, IndexedLinear, randomize
from bench.op_cases import BLOCK_CASES, SMOKE_BLOCK_CASES, BlockCase, Case, cases
from bench.slims import SlimBuild
from bench.work import Work


def op_works(smoke: bool) -> list[Work]:
    """All works of level op; with ``smoke`` one of each kind, tiny and of odd sizes."""
    works = []
    for case in cases("smoke" if smoke else "bench"):
        works += linear_works(case, smoke)
    works += [block_work(case, smoke) for case in (SMOKE_BLOCK_CASES if smoke else BLOCK_CASES)]
    if smoke:
        works += ffn_works(24, 51, None, (7,), backward=(7,), compiled=(), smoke=True)
        works += ffn_works(24, 51, 13, (7,), backward=(), compiled=(), smoke=True)
        works += attention_works(24, 3, 1, ((3, 9),), backward=((3, 9),), smoke=True)
        return works
    every = (1, 16, 128, 1024, 4096)
    for width in (None, 320, 308):
        backward = (1024,) if width != 308 else ()
        compiled = (1024,) if width != 308 else ()
        works += ffn_works(384, 1536, width, every, backward=backward, compiled=compiled)
    shapes = ((8, 128), (32, 32), (1, 128), (1, 16))
    for kept in (None, 5):
        works += attention_works(384, 12, kept, shapes, backward=((8, 128),))
    return works


def normal(name: str, *shape: int) -> Tensor:
    """Normal float32 numbers, the same for a name and shape."""
    generator = torch.Generator().manual_seed(seed_of(f"{name} {shape}"))
    return torch.randn(shape, generator=generator)


def right_padding(batch: int, tokens: int) -> Tensor:
    """A mask [batch, tokens], int64: 1 up to a length between a quarter and all, then 0."""
    generator = torch.Generator().manual_seed(batch * tokens)
    lengths = torch.randint(max(1, tokens // 4), tokens + 1, (batch, 1), generator=generator)
    return (torch.arange(tokens) < lengths).long()


def both_ways(make: Callable[..., Work], backward: bool) -> list[Work]:
    """The forward alone, and forward and backward too where asked."""
    return [make(backward=False), *([make(backward=True)] if backward else [])]


def kept_index(kept: int | None, size: int) -> Tensor | None:
    if kept is None:
        return None
    generator = torch.Generator().manual_seed(size + kept)
    return torch.randperm(size, generator=generator)[:kept].sort().values


def _build_linear(case: Case) -> nn.Module:
    if case.R is None and case.C is None:
        return randomize(nn.Linear(case.K, case.N, case.bias))
    rows, cols = kept_index(case.R, case.N), kept_index(case.C, case.K)
    return randomize(IndexedLinear(case.N, case.K, rows, cols))


def linear_works(case: Case, smoke: bool) -> list[Work]:
    """One row of the table of shapes, of 2-D x with a bias."""
    (M,) = case.lead
    N, K = case.N if case.R is None else case.R, case.K if case.C is None else case.C
    indexed = (case.R, case.C) != (None, None)
    kept = "".join(f", {n} {what}" for n, what in ((case.R, "rows"), (case.C, "cols")) if n)
    name = f"{'indexed linear' if indexed else 'linear'} {case.K}->{case.N}{kept}"

    def make(backward: bool) -> Work:
        figures = counts.figures(
            counts.linear(M, K, N), M * K + M * N, M if backward else 0, case.N * case.K + case.N
        )
        return Work(
            level="op",
            name=name + backward * " fwd+bwd",
            shape=f"M={M}",
            build=partial(_build_linear, case),
            inputs=partial(_one, name, M, K),
            **figures,
            backward=backward,
            compiled=case.compiled and not backward,
            smoke=smoke,
            tags=frozenset({"indexed"} if indexed else {"linear"}),
        )

    return both_ways(make, case.backward)


def _kept_blocks(case: BlockCase) -> Tensor:
    """Bool, one per block: the same share everywhere, at places drawn at random."""
    rows, columns = -(-case.N // case.block[0]), -(-case.K // case.block[1])
    generator = torch.Generator().manual_seed(rows + columns)
    order = torch.randperm(rows * columns, generator=generator)
    return (order < round(case.density * rows * columns)).view(rows, columns)


def _build_block_masked(case: BlockCase) -> nn.Module:
    return randomize(BlockMaskedLinear(case.N, case.K, case.block, _kept_blocks(case)))


def block_work(case: BlockCase, smoke: bool, backward: bool = True) -> Work:
    """A linear of which a share of the blocks is kept, forward and (unless told otherwise)
    backward: its limit is that share of the products, and eager multiplies by the mask."""
    M, N, K = case.M, case.N, case.K
    share = float(_kept_blocks(case).float().mean())
    bn, bk = case.block
    name = f"block-masked linear {K}->{N}, {bn}x{bk}, {share:.0%} kept" + backward * " fwd+bwd"
    figures = counts.figures(counts.linear(M, K, N), M * K + M * N, M if backward else 0)
    figures["flops"] *= share
    return Work(
        level="op",
        name=name,
        shape=f"M={M}",
        build=partial(_build_block_masked, case),
        inputs=partial(_one, name, M, K),
        **figures,
        backward=backward,
        smoke=smoke,
        tags=frozenset({"blocks"}),
    )


def _one(name: str, *shape: int) -> tuple[Tensor, ...]:
    return (normal(name, *shape),)


def _build_ffn(H: int, width: int) -> nn.Module:
    return randomize(Ffn(H, width))


def ffn_works(
    H: int,
    dense: int,
    slim: int | None,
    rows: tuple[int, ...],
    backward: tuple[int, ...] = (),
    compiled: tuple[int, ...] = (),
    smoke: bool = False,
) -> list[Work]:
    """FFNs of ``H -> dense -> H``, or cut to ``slim``, for every M of ``rows``."""
    width = dense if slim is None else slim
    name = f"FFN {H}->{width}" + (" slim" if slim else "")
    build = partial(_build_ffn, H, dense)
    cut = None
    if slim is not None:
        cut = SlimBuild(build, partial(_one, name, 2, H), (slim,), ())

    def make(M: int, backward: bool) -> Work:
        return Work(
            level="op",
            name=name + backward * " fwd+bwd",
            shape=f"M={M}",
            build=cut or build,
            inputs=partial(_one, name, M, H),
            **counts.figures(counts.ffn(M, H, width), 2 * M * H, M if backward else 0),
            backward=backward,
            compiled=M in compiled and not backward,
            smoke=smoke,
            tags=frozenset({"ffn", *(("slim",) if cut else ())}),
            dense=build if cut else None,
            plan=cut.plan if cut else None,
        )

    return [w for M in rows for w in both_ways(partial(make, M), M in backward)]


def _build_attention(H: int, heads: int) -> nn.Module:
    return randomize(Attention(H, heads))


def attended(batch: int, tokens: int) -> Tensor:
    """Where :func:`right_padding` leaves a token, bool."""
    return right_padding(batch, tokens).bool()


def lengths(batch: int, tokens: int) -> list[int]:
    """How many tokens :func:`right_padding` leaves to each sequence."""
    return [int(length) for length in right_padding(batch, tokens).sum(1)]


def _padded(name: str, batch: int, tokens: int, H: int) -> tuple[Tensor, ...]:
    return normal(name, batch, tokens, H), right_padding(batch, tokens)


def attention_works(
    H: int,
    heads: int,
    slim: int | None,
    shapes: tuple[tuple[int, int], ...],
    backward: tuple[tuple[int, int], ...] = (),
    smoke: bool = False,
) -> list[Work]:
    """Attention blocks of ``heads``, or cut to ``slim`` of them, with padding."""
    d, left = H // heads, heads if slim is None else slim
    name = f"attention {H}, {left} heads" + (" slim" if slim else "")
    build = partial(_build_attention, H, heads)
    cut = None
    if slim is not None:
        cut = SlimBuild(build, partial(_padded, name, 2, 8, H), (), (slim,))

    def make(shape: tuple[int, int], backward: bool) -> Work:
        B, T = shape
        count = counts.attention_block(B, T, H, left, d)
        if not backward:  # gradients are asked for at every token
            count = counts.unpadded(
                count, lambda b, t: counts.attention_block(b, t, H, left, d), lengths(B, T)
            )
        return Work(
            level="op",
            name=name + backward * " fwd+bwd",
            shape=f"{B}x{T} padded",
            build=cut or build,
            inputs=partial(_padded, name, B, T, H),
            **counts.figures(count, 2 * B * T * H + B * T, B * T if backward else 0),
            backward=backward,
            compiled=slim is not None and shape == (8, 128) and not backward,
            smoke=smoke,
            tags=frozenset({"attention", *(("slim",) if cut else ())}),
            dense=build if cut else None,
            plan=cut.plan if cut else None,
            attended=None if backward else partial(attended, B, T),
        )

    return [w for s in shapes for w in both_ways(partial(make, s), s in backward)]
