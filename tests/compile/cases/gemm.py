"""The core of products: epilogues, gating, gradients, compact copies, at aligned and odd widths."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from tests.compile.cases import Case, Meta, Promise

M, N, K = 8192, 3072, 768  # of a BERT-base layer
KEPT = 616  # of its channels: a multiple of 8, so that rows start on 16-byte boundaries
ODD = "odd widths: no address but the first is aligned"
SCATTER = "an index decides, element by element, what is loaded"
KERNELS = {
    "_product_kernel": Promise(),
    "_gated_kernel": Promise(),
    "_product_dw_kernel": Promise(),
    "_product_descriptor_kernel": Promise(),
    "_gated_descriptor_kernel": Promise(),
    "_dw_descriptor_kernel": Promise(),
    "_grouped_kernel": Promise(),
    "_gather_kernel": Promise(matrix=False, narrow=SCATTER),
    "_scatter_sum_kernel": Promise(matrix=False, narrow=SCATTER),
}
ACTIVATIONS = ("relu", "squared_relu", "gelu_tanh", "quick_gelu", "silu")


def cases(meta: Meta) -> Iterator[Case]:
    """Every product in every dtype; epilogues and odd widths in fp16."""
    for dtype, full in meta.dtypes():
        yield from _products(meta, dtype, KEPT, full, "")
    yield from _products(meta, "fp16", 615, True, ODD)
    yield from _epilogues(meta)
    yield from _copies(meta)


def _products(meta: Meta, dtype: str, kept: int, full: bool, narrow: str) -> Iterator[Case]:
    from slimkern.ops import _gemm

    make = partial(meta, dtype=dtype)
    x, w, up, gy = make(M, K), make(kept, K), make(kept, K), make(M, kept)
    calls = {
        "product": partial(_gemm.product, x, w, make(kept), activation="gelu"),
        "product, turned": partial(_gemm.product, x, make(K, kept).t(), activation="gelu"),
        "product back": partial(_gemm.product, gy, make(K, kept), make(K), residual=x),
        "product of few tokens": partial(_gemm.product, make(63, K), w, make(kept)),
        "gated": partial(_gemm.gated_product, x, w, up, make(kept), make(kept), activation="silu"),
        "dx": partial(_gemm.product_dx, gy, w),
        "dw": partial(_gemm.product_dw, gy, x),
        "dw of few tokens": partial(_gemm.product_dw, make(63, kept), make(63, K)),
    }
    for name, call in calls.items():
        yield Case(f"{name} {dtype} {kept}", dtype, call, full or "few" in name, narrow)


def _epilogues(meta: Meta) -> Iterator[Case]:
    from slimkern.ops import _gemm

    x, w, bias, index = meta(M, K), meta(N, K), meta(N), meta.index(KEPT)
    product = partial(_gemm.product, x, w, bias, index)
    yield Case("product of kept rows, both kept", "fp16", partial(product, keep_input=True), True)
    residual = partial(product, residual=meta(M, KEPT))
    yield Case("product of kept rows, residual", "fp16", residual)
    for name in ACTIVATIONS:
        yield Case(f"product, {name}", "fp16", partial(product, activation=name), True)
    kept = partial(_gemm.product, x, w, bias, activation="gelu", keep_input=True)
    yield Case("product, both kept", "fp16", kept, True)
    for dtype in ("fp16", "bf16"):
        yield from _wide(meta, dtype)
    gate, bias = meta(KEPT, K), meta(KEPT)
    gelu = partial(_gemm.gated_product, x, gate, gate, bias, bias, activation="gelu")
    yield Case("gated, gelu", "fp16", gelu, True)
    pairs = partial(
        _gemm.grouped_products,
        [meta(M, 312), meta(M, 616)],
        [meta(K, 312), meta(K, 616)],
        [meta(K), None],
    )
    yield Case("grouped", "fp16", pairs)


def _wide(meta: Meta, dtype: str) -> Iterator[Case]:
    """Sums of halves that are added to float32, or kept in it: gradients of float32 models."""
    from slimkern.ops import _gemm

    gy, w, out = meta(M, KEPT, dtype=dtype), meta(KEPT, K, dtype=dtype), meta(M, K, dtype="fp32")
    turned = partial(_gemm.product, gy, w.t(), out=out)
    full = dtype != "fp16"
    added = partial(turned, residual=out)
    yield Case(f"product, float32 residual and result {dtype}", dtype, added, full)
    yield Case(f"product, float32 result {dtype}", dtype, turned, full)
    straight = partial(_gemm.product, gy, meta(K, KEPT, dtype=dtype), meta(K, dtype=dtype))
    straight = partial(straight, residual=out)
    yield Case(f"product, float32 residual {dtype}", dtype, straight, True)
    both = partial(straight, out=out, activation="gelu", keep_input=True)
    yield Case(f"product, float32 residual and result, both kept {dtype}", dtype, both, True)


def _copies(meta: Meta) -> Iterator[Case]:
    from slimkern.ops import _gemm

    w, rows, cols = meta(N, K), meta.index(KEPT), meta.index(312)
    yield Case("copy of rows", "fp16", partial(_gemm.gathered, w, rows, None))
    yield Case("copy of columns", "fp16", partial(_gemm.gathered, w, None, cols))
    turned = partial(_gemm.gathered, w, rows, cols, transposed=True)
    yield Case("copy of both, transposed", "fp16", turned)
    few = partial(_gemm.product_dw, meta(M, KEPT), meta(M, 312), rows=rows, cols=cols, shape=(N, K))
    yield Case("dw of both", "fp16", few, True)
