"""The one table of shapes of linear and indexed_linear: tests and benchmarks read it.

The tests take what is awkward (odd, empty, strided, tied to no tile), the benchmarks what is real;
the smoke run takes some of the tests' own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Use = Literal["test", "bench", "smoke"]


@dataclass(frozen=True)
class Case:
    """One shape of ``indexed_linear``; without R and C, of ``linear``.

    Attributes:
        lead: leading dimensions of x.
        N, K: the shape of weight.
        R, C: how many rows and columns are kept; None: no index is given.
        bias: whether there is one.
        layout: ``contiguous``; ``transposed`` (x and the weight); ``sliced`` (every second column
            of larger tensors).
        uses: who takes it.
        backward: measured forward and backward too; the tests always do both.
        compiled: torch.compile is measured on it.
    """

    lead: tuple[int, ...]
    N: int
    K: int
    R: int | None = None
    C: int | None = None
    bias: bool = True
    layout: str = "contiguous"
    uses: frozenset[Use] = frozenset({"test"})
    backward: bool = False
    compiled: bool = False

    @property
    def id(self) -> str:
        """The name in a test's id."""
        lead = "x".join(map(str, self.lead)) or "none"
        kept = "".join(f"-{n}{v}" for n, v in (("R", self.R), ("C", self.C)) if v is not None)
        extra = "" if self.bias else "-nobias"
        return f"{lead}-{self.N}-{self.K}{kept}{extra}-{self.layout}"


def _awkward() -> list[Case]:
    cases = [
        Case((m,), n, k) for m, n, k in ((1, 1, 1), (17, 63, 130), (130, 17, 63), (63, 130, 1))
    ]
    for m, n, k in ((1, 17, 63), (17, 130, 17), (63, 63, 63), (130, 130, 130), (33, 96, 64)):
        cases += [
            Case((m,), n, k, R=n // 2, C=None),
            Case((m,), n, k, R=None, C=max(1, k // 3)),
            Case((m,), n, k, R=max(1, n // 3), C=k - 1, bias=False),
        ]
    cases += [
        Case((), 63, 17, R=9, C=8),
        Case((3, 5, 7), 63, 17, R=9, C=8),
        Case((0,), 17, 17, R=3, C=4),
        Case((2, 0), 17, 17),
        Case((17,), 17, 63, R=0, C=5),
        Case((17,), 17, 63, R=5, C=0),
        Case((17,), 17, 63, R=0, C=0, bias=False),
        Case((17,), 17, 63, R=17, C=63),
        Case((300,), 70, 600, R=40, C=520),  # several blocks in each direction of the reduction
        Case((130,), 300, 40, R=290),
    ]
    for layout in ("transposed", "sliced"):
        cases += [
            Case((63,), 130, 17, layout=layout),
            Case((63,), 130, 17, R=63, C=9, layout=layout),
            Case((2, 17), 63, 130, R=17, C=63, bias=False, layout=layout),
        ]
    return [_in_smoke(case) for case in cases]


def _in_smoke(case: Case) -> Case:
    """The one dense and the two indexed shapes of the tests that the smoke run takes too."""
    taken = {"17-63-130-contiguous", "33-96-64-R48-contiguous", "63-63-63-C21-contiguous"}
    if case.id not in taken:
        return case
    dense = case.R is None and case.C is None
    return replace(case, uses=case.uses | {"smoke"}, backward=True, compiled=dense)


# The linears of an encoder of width 384, dense and with what the reference recipe leaves (320 of
# 1536 channels), and 308, which is no multiple of anything.
_DENSE = ((1536, 384), (384, 1536), (384, 384), (320, 384), (308, 384))
_INDEXED = ((1536, 384, 320, None), (1536, 384, 308, None), (384, 1536, None, 320),
            (384, 1536, None, 308))  # fmt: skip


def _real() -> list[Case]:
    bench: frozenset[Use] = frozenset({"bench"})
    cases = [
        Case((m,), n, k, uses=bench, backward=m == 1024 and n in (1536, 320),
             compiled=m == 1024 and n == 1536)
        for n, k in _DENSE
        for m in (1, 16, 128, 1024, 4096)
    ]  # fmt: skip
    cases += [
        Case((m,), n, k, r, c, uses=bench, backward=m == 1024 and 320 in (r, c),
             compiled=m == 1024 and r == 320)
        for n, k, r, c in _INDEXED
        for m in (128, 1024)
    ]  # fmt: skip
    return cases


@dataclass(frozen=True)
class BlockCase:
    """A linear whose weight is masked block by block, measured forward and backward.

    Attributes:
        M, N, K: rows of x; the shape of weight.
        block: rows and columns of the weight in a block.
        density: the share of blocks that are kept.
    """

    M: int
    N: int
    K: int
    block: tuple[int, int]
    density: float = 0.2


BLOCK_CASES = [
    BlockCase(1024, n, k, block)
    for block in ((4, 1), (32, 32))
    for n, k in ((1536, 384), (384, 1536), (384, 384))
]
SMOKE_BLOCK_CASES = [BlockCase(17, 63, 130, (4, 1)), BlockCase(17, 63, 130, (32, 32), 0.5)]

TABLE = (*_awkward(), *_real())


def cases(use: Use) -> list[Case]:
    """The rows of the table for one use, in order."""
    return [case for case in TABLE if use in case.uses]
