"""``indexed_linear``: forward, dx, dW and db with kept rows, kept columns, odd widths."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from tests.compile.cases import Case, Meta, Promise

M, N, K = 8192, 3072, 768  # of a BERT-base layer
ODD = "odd widths: no address but the first is aligned"
KERNELS = {"_column_sums_kernel": Promise(matrix=False)}


def cases(meta: Meta) -> Iterator[Case]:
    """What the products' own cases leave: the bias gradient, and each call as the op makes it."""
    for dtype, full in meta.dtypes():
        yield from _calls(meta, dtype, 312, None, full)
    yield from _calls(meta, "fp16", None, 312, True)
    yield from _calls(meta, "fp16", 307, None, True, ODD)
    yield from _calls(meta, "fp16", 312, 307, True, ODD)


def _calls(
    meta: Meta, dtype: str, rows: int | None, cols: int | None, full: bool, narrow: str = ""
) -> Iterator[Case]:
    from slimkern.ops.indexed_linear import triton as ops

    make = partial(meta, dtype=dtype)
    r = None if rows is None else meta.index(rows)
    c = None if cols is None else meta.index(cols)
    R, C = rows or N, cols or K
    x, gy = make(M, C), make(M, R)
    calls = {
        "fwd": partial(ops.indexed_linear_fwd, x, make(N, K), make(N), r, c),
        "dx": partial(ops.indexed_linear_dx, gy, make(N, K), r, c),
        "dw": partial(ops.indexed_linear_dw, gy, x, r, c, N, K),
        "db": partial(ops.indexed_linear_db, gy, r, N),
    }
    for name, call in calls.items():
        yield Case(f"{name} {dtype} {R}x{C}", dtype, call, full, narrow)
