"""``block_masked_linear``: products through lists or with the mask in the loop; what makes both."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from tests.compile.cases import Case, Meta, Promise

N, K = 3072, 768  # of a BERT-base layer
MANY, FEW = 8192, 200  # tokens: the mask is applied once, or in the loop
BITS = "a block's bit decides, element by element, what is loaded"
KERNELS = {
    "_block_masked_product_kernel": Promise(),
    "_block_masked_dw_kernel": Promise(),
    "_flags_kernel": Promise(matrix=False, warps=16, narrow=BITS),
    "_list_kernel": Promise(matrix=False, warps=16, narrow=BITS),
    "_copy_kernel": Promise(matrix=False, warps=16, narrow=BITS),
}


def cases(meta: Meta) -> Iterator[Case]:
    """Square blocks go through lists; thin ones are masked while they are loaded."""
    for dtype, full in meta.dtypes():
        yield from _calls(meta, dtype, MANY, (32, 32), full, "")
        yield from _calls(meta, dtype, FEW, (4, 1), full, BITS)
    yield from _calls(meta, "fp16", MANY, (1, 1), True, "")
    yield from _calls(meta, "fp16", FEW, (32, 32), True, BITS)


def _calls(
    meta: Meta, dtype: str, tokens: int, block: tuple[int, int], full: bool, narrow: str
) -> Iterator[Case]:
    from slimkern.ops.block_masked_linear import triton as ops

    make, (bn, bk) = partial(meta, dtype=dtype), block
    bits = meta(-(-N // bn), -(-K // (8 * bk)), dtype="u8")
    x, w, gy = make(tokens, K), make(N, K), make(tokens, N)
    calls = {
        "fwd": partial(ops.block_masked_linear_fwd, x, w, make(N), bits, bn, bk),
        "dx": partial(ops.block_masked_linear_dx, gy, w, bits, bn, bk),
        "dw": partial(ops.block_masked_linear_dw, gy, x, bits, bn, bk, N, K),
    }
    for name, call in calls.items():
        yield Case(f"{name} {dtype} {bn}x{bk}, {tokens} tokens", dtype, call, full, narrow)
