"""What slimkern's launchers would launch: they run on tensors without memory, recorders note it."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and its arguments by name."""

    kernel: str
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]

    def size(self, name: str) -> int:
        """A size argument; ``#0`` to ``#2`` are the grid's."""
        return self.grid[int(name[1:])] if name.startswith("#") else int(self.arguments[name])


@dataclass
class _Recorder:
    """Stands for a kernel: ``recorder[grid](...)`` notes the launch."""

    name: str
    kernel: Any
    launches: list[Launch] = field(default_factory=list)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        function = getattr(self.kernel, "fn", self.kernel)
        while not inspect.isfunction(function) and hasattr(function, "fn"):
            function = function.fn  # under an autotuner
        names = list(inspect.signature(function).parameters)

        def launch(*positional: Any, **named: Any) -> None:
            arguments = dict(zip(names, positional)) | named
            sizes = grid(arguments) if callable(grid) else grid
            self.launches.append(Launch(self.name, tuple(sizes), arguments))

        return launch


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Notes every launch of slimkern's kernels instead of running it.

    Every attribute of a loaded module of ``slimkern.ops`` whose name ends in ``_kernel`` is
    replaced: import the backends first.
    """
    launches: list[Launch] = []
    replaced: list[tuple[Any, str, Any]] = []
    for module in [m for name, m in sys.modules.items() if name.startswith("slimkern.ops")]:
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel") and hasattr(kernel, "fn"):
                replaced.append((module, name, kernel))
                setattr(module, name, _Recorder(name, kernel, launches))
    try:
        yield launches
    finally:
        for module, name, kernel in replaced:
            setattr(module, name, kernel)


CASES = ((4096, 3072, 768, 614, None), (4096, 768, 3072, None, 614), (1024, 3072, 768, 640, None))
"""Of the products: M, N, K, kept rows, kept columns."""
Calls = dict[str, Callable[[], Any]]


def launches(dtype: torch.dtype = torch.bfloat16) -> list[tuple[str, Launch]]:
    """(what is computed, a launch of it): every kernel at BERT-base's sizes; nothing is computed.

    Of block masks all blocks are kept, as a mask without memory has no blocks to tell apart.
    """
    calls: Calls = {}
    for case in CASES:
        calls |= _products(dtype, *case)
    calls |= _rows(dtype, 4096, 768, 616) | _gathers(dtype, 32, 128, 768)
    calls |= _blocks(dtype, 4096, 3072, 768)
    entries = []
    for name, call in calls.items():
        with recorded() as found:
            call()
        entries += [(name, launch) for launch in found]
    return entries


def _op(name: str) -> Any:
    return importlib.import_module(f"slimkern.ops.{name}")


def _meta(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _products(dtype: torch.dtype, M: int, N: int, K: int, R: int | None, C: int | None) -> Calls:
    linear, gemm = _op("indexed_linear.triton"), _op("_gemm")
    kept = [None if n is None else _meta(torch.int64, n) for n in (R, C)]
    r, c = N if R is None else R, K if C is None else C
    x, gy, w = (_meta(dtype, *shape) for shape in ((M, c), (M, r), (N, K)))
    narrow, bias = _meta(dtype, r, c), _meta(dtype, N)
    kinds = "".join(f", {n} {what}" for n, what in ((R, "rows"), (C, "columns")) if n)
    calls: Calls = {
        "fwd": lambda: linear.indexed_linear_fwd(x, w, bias, *kept),
        "dx": lambda: linear.indexed_linear_dx(gy, w, *kept),
        "dW": lambda: linear.indexed_linear_dw(gy, x, *kept, N, K),
        "db": lambda: linear.indexed_linear_db(gy, kept[0], N),
        "gated": lambda: gemm.gated_product(x, narrow, narrow, None, None, activation="silu"),
        "two at once": lambda: gemm.grouped_products([x, x], [narrow, narrow[:-7]], [None, None]),
    }
    return {f"{name}, {M} x {K} -> {N}{kinds}": call for name, call in calls.items()}


def _rows(dtype: torch.dtype, M: int, H: int, width: int) -> Calls:
    """Passes over M tokens: of the hidden size H, and of an FFN's kept channels."""
    activation, norm = _op("activation.triton"), _op("add_norm.triton")
    dropout, alone = _op("seeded_dropout.triton"), _op("_row_norm")
    x, wide = _meta(dtype, M, H), _meta(torch.float32, M, H)
    weight, stats = _meta(torch.float32, H), _meta(torch.float32, M, 3)
    h, seed = _meta(dtype, M, width), _meta(torch.int64, 1)
    calls: Calls = {
        f"gelu, {M} x {width}": lambda: activation.activation_fwd(h, "gelu"),
        f"gelu's gradient, {M} x {width}": lambda: activation.activation_grad(h, h, "gelu"),
        "add and norm": lambda: norm.add_norm_fwd(x, x, weight, weight, 1e-12, None, 0.0),
        "its gradient": lambda: norm.add_norm_grad(x, wide, stats, weight, True, None, 0.0),
        "dropout": lambda: dropout.seeded_dropout(x, seed, 0.1),
        "norm": lambda: alone.row_norm(x, weight, weight, 1e-12, "layer", y=x),
    }
    return {n if " x " in n else f"{n}, {M} x {H}": call for n, call in calls.items()}


def _gathers(dtype: torch.dtype, B: int, T: int, H: int) -> Calls:
    """Embeddings, and what masked attention gathers, of five heads of 64."""
    kept, embedded = _op("kept_linear.triton"), _op("embeddings.triton")
    w, bias, rows = _meta(dtype, H, H), _meta(dtype, H), _meta(torch.int64, 320)
    heads, ids = _meta(dtype, B, 5, T, 64), _meta(torch.int64, B, T)
    words, types, places = (_meta(dtype, n, H) for n in (30522, 2, 512))
    return {
        "kept rows of q, k, v": lambda: kept.kept_weights(
            [w] * 3, [bias] * 3, [rows] * 3, None, dtype, 64
        ),
        "gradients of heads": lambda: kept.joined_heads([heads] * 3, dtype),
        f"embeddings, {B} x {T}": lambda: embedded.embeddings(
            ids, words, types, None, places, None, bias, bias, 1e-12
        ),
    }


def _blocks(dtype: torch.dtype, M: int, N: int, K: int) -> Calls:
    blocks = _op("block_masked_linear.triton")
    x, gy, w = (_meta(dtype, *shape) for shape in ((M, K), (M, N), (N, K)))
    found: Calls = {}
    for tokens, (bn, bk) in ((M, (32, 32)), (200, (4, 1))):
        bits = _meta(torch.uint8, -(-N // bn), -(-K // (8 * bk)))
        given = (x[:tokens], gy[:tokens], bits, bn, bk)
        name = f"{tokens} x {K} -> {N}, blocks {bn}x{bk}"
        found[f"fwd, {name}"] = partial(_block_call, blocks.block_masked_linear_fwd, w, given)
        found[f"dx, {name}"] = partial(_block_call, blocks.block_masked_linear_dx, w, given)
        found[f"dW, {name}"] = partial(_block_call, blocks.block_masked_linear_dw, w, given)
    return found


def _block_call(call: Callable[..., Tensor], w: Tensor, given: tuple[Any, ...]) -> Tensor:
    """With the way through lists, which otherwise is chosen by the mask's own numbers."""
    x, gy, *mask = given
    with mock.patch.object(_op("block_masked_linear.triton"), "_is_dense", return_value=False):
        return _block_product(call, w, x, gy, mask)


def _block_product(
    call: Callable[..., Tensor], w: Tensor, x: Tensor, gy: Tensor, mask: list[Any]
) -> Tensor:
    if call.__name__.endswith("fwd"):
        return call(x, w, None, *mask)
    return call(gy, w, *mask) if call.__name__.endswith("dx") else call(gy, x, *mask, *w.shape)
