"""Masked training: activations, LayerNorm of a sum, dropout, compact copies, joined heads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from tests.compile.cases import Case, Meta, Promise

M, HIDDEN, N = 4096, 768, 3072
KEPT = 616
HEADS = "columns of three tensors side by side, and rows of heads of 64"
INDEX = "an index decides, element by element, what is loaded"
KERNELS = {
    "_activation_fwd_kernel": Promise(matrix=False, warps=16),
    "_activation_grad_kernel": Promise(matrix=False),
    "_add_norm_fwd_kernel": Promise(matrix=False),
    "_add_norm_grad_kernel": Promise(matrix=False),
    "_seeded_dropout_kernel": Promise(matrix=False, warps=16),
    "_kept_weights_kernel": Promise(matrix=False, narrow=INDEX),
    "_joined_heads_kernel": Promise(matrix=False, narrow=HEADS),
}
ACTIVATIONS = ("relu", "squared_relu", "gelu_tanh", "quick_gelu", "silu")


def cases(meta: Meta) -> Iterator[Case]:
    """Every pass in every dtype; every activation in the full matrix."""
    for dtype, full in meta.dtypes():
        if dtype != "tf32":
            yield from _activations(meta, dtype, full)
            yield from _norms(meta, dtype, full)
            yield from _kept(meta, dtype, full)


def _activations(meta: Meta, dtype: str, full: bool) -> Iterator[Case]:
    from slimkern.ops.activation import triton as ops
    from slimkern.ops.seeded_dropout.triton import seeded_dropout

    x = meta(M, KEPT, dtype=dtype)
    for name in ("gelu", *ACTIVATIONS):
        rest = full or name != "gelu"
        yield Case(f"{name} {dtype}", dtype, partial(ops.activation_fwd, x, name), rest)
        yield Case(f"{name} grad {dtype}", dtype, partial(ops.activation_grad, x, x, name), rest)
    yield Case(f"dropout {dtype}", dtype, partial(seeded_dropout, x, meta.index(1), 0.1), full)


def _norms(meta: Meta, dtype: str, full: bool) -> Iterator[Case]:
    from slimkern.ops.add_norm import triton as ops

    for width in (HIDDEN, 384, 4096):
        x, s = meta(M, width, dtype=dtype), meta(M, width, dtype="fp32")
        weight, stats = meta(width, dtype="fp32"), meta(M, 3, dtype="fp32")
        for seed in (None, meta.index(1)):
            name = f"{dtype} {width}{'' if seed is None else ', dropout'}"
            rest = full or width == 384 or (seed is None) == (width == HIDDEN)
            p = 0.0 if seed is None else 0.1
            fwd = partial(ops.add_norm_fwd, x, x, weight, weight, 1e-5, seed, p)
            yield Case(f"add_norm {name}", dtype, fwd, rest)
            grad = partial(ops.add_norm_grad, x, s, stats, weight, dtype != "fp32", seed, p)
            yield Case(f"add_norm grad {name}", dtype, grad, rest)


def _kept(meta: Meta, dtype: str, full: bool) -> Iterator[Case]:
    import torch

    from slimkern.ops.kept_linear import triton as ops

    types = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    w, b, rows = meta(N, HIDDEN, dtype="fp32"), meta(N, dtype="fp32"), meta.index(KEPT)
    kept = partial(ops.kept_weights, dtype=types[dtype], multiple=64)
    one = partial(kept, [w], [b], [rows], None)
    yield Case(f"kept rows in {dtype}", dtype, one, full)
    columns = partial(kept, [w.t()], [None], [None], rows)
    yield Case(f"kept columns in {dtype}", dtype, columns, full)
    three = partial(kept, [w] * 3, [b, None, b], [rows] * 3, None)
    yield Case(f"kept rows of three in {dtype}", dtype, three, full)
    grads = [meta(32, 5, 128, 64, dtype=dtype)] * 3
    yield Case(f"joined heads {dtype}", dtype, partial(ops.joined_heads, grads, types[dtype]), full)
