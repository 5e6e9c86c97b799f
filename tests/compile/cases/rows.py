"""Passes over rows of fused blocks: norms with masks, embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from tests.compile.cases import Case, Meta, Promise

B, T, HIDDEN = 64, 128, 768
KERNELS = {
    "_row_norm_kernel": Promise(matrix=False, warps=16),
    "_embeddings_kernel": Promise(matrix=False, warps=16),
}


def cases(meta: Meta) -> Iterator[Case]:
    """Widths that are a power of two, and not; each kind of mask."""
    for dtype, full in meta.dtypes():
        if dtype != "tf32":
            yield from _norms(meta, dtype, full)
            yield from _embeddings(meta, dtype, full)


def _norms(meta: Meta, dtype: str, full: bool) -> Iterator[Case]:
    from slimkern.ops._row_norm import row_norm

    for width in (HIDDEN, 384, 4096):
        x, low = meta(B * T, width, dtype=dtype), meta(B * T, width, dtype="bf16")
        weight = meta(width, dtype=dtype)
        layer = partial(row_norm, x, weight, weight, 1e-5, kind="layer", y=x)
        rest = full or width != HIDDEN
        yield Case(f"layer norm {dtype} {width}", dtype, layer, rest)
        yield Case(f"rms norm {dtype} {width}", dtype, partial(layer, kind="rms", low=low), True)
        masks = {
            "lengths": meta(B, dtype="i64"),
            "bools": meta(B, T, dtype="bool"),
            "added": meta(B, T, dtype=dtype),
        }
        for name, mask in masks.items():
            call = partial(layer, mask=mask, tokens=T)
            yield Case(f"layer norm {dtype} {width}, {name}", dtype, call, rest or name != "bools")


def _embeddings(meta: Meta, dtype: str, full: bool) -> Iterator[Case]:
    from slimkern.ops.embeddings.triton import embeddings

    for width in (HIDDEN, 384):
        words, others = meta(30522, width, dtype=dtype), meta(512, width, dtype=dtype)
        ids, norm = meta(B, T, dtype="i64"), meta(width, dtype=dtype)
        whole = partial(embeddings, ids, words, others, ids, others, ids, norm, norm, 1e-12)
        yield Case(f"embeddings {dtype} {width}", dtype, whole, full or width != HIDDEN)
        least = partial(embeddings, ids, words, None, None, others, None, norm, norm, 1e-12)
        yield Case(f"embeddings {dtype} {width}, no types", dtype, least, True)
