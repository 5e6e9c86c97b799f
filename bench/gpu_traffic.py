"""What each kernel moves and multiplies, from the parameters it would be launched with.

The launchers run on tensors without memory, and a recorder in the place of every kernel notes grid,
sizes and tiles. For each operand two figures follow: ``ideal``, every number once; and ``tiled``,
once for each tile of the output that needs it, which is what passes between the L2 cache and the
multiprocessors. Beside them stands the bound of the data sheets' peaks, for the ideal.

    python -m bench.gpu_traffic                      # every kernel, BERT-base's shapes, markdown
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.gpu_bounds import GPUS, roofline
from bench.gpu_shapes import SHAPES
from slimkern.report.speed_schema import Precision

GROUPED = "_grouped_kernel"


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid and its arguments by name."""

    kernel: str
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]

    def size(self, name: str) -> int:
        """A size argument; ``#0`` to ``#2`` are the grid's."""
        return self.grid[int(name[1:])] if name.startswith("#") else int(self.arguments[name])


@dataclass(frozen=True)
class Traffic:
    """Flops of the matrix products, and bytes moved: once each, and once per tile."""

    flops: float
    ideal: float
    tiled: float


def traffic(launch: Launch, kept: float = 1.0) -> Traffic:
    """What a launch costs.

    Args:
        launch: with the arguments that its entry in ``SHAPES`` names.
        kept: where a mask skips, the share of the steps that are not skipped.

    Raises:
        KeyError: the kernel has lost such an argument.
    """
    if launch.kernel == GROUPED:
        parts = [traffic(problem) for problem in _problems(launch)]
        return Traffic(*(sum(figures) for figures in zip(*map(astuple, parts))))
    shape = SHAPES.get(launch.kernel)
    if shape is None:
        moved = float(sum(_bytes(t) for t in launch.arguments.values() if isinstance(t, Tensor)))
        return Traffic(0.0, moved, moved)
    flops = sum(2.0 * math.prod(map(launch.size, sizes)) for sizes in shape.products)
    ideal = tiled = 0.0
    for name, sizes in shape.operands.items():
        given = launch.arguments[name]
        tensor = getattr(given, "base", given)  # of a tensor descriptor
        if not isinstance(tensor, Tensor):
            continue
        once = float(math.prod(map(launch.size, sizes))) * tensor.element_size()
        again = 1
        if name not in shape.outputs:
            for size, block in shape.tile.items():
                if size not in sizes:
                    again *= -(-launch.size(size) // int(launch.arguments[block]))
        ideal += once * (kept if name in shape.masked else 1.0)
        tiled += once * again * (kept if name in shape.skipped else 1.0)
    return Traffic(flops * (kept if shape.skipped else 1.0), ideal, tiled)


def _problems(launch: Launch) -> Iterator[Launch]:
    """A launch of several products of their own sizes, as one launch for each."""
    given, sizes = launch.arguments, launch.arguments["sizes"]
    for i, (M, N, K) in enumerate(zip(sizes[::3], sizes[1::3], sizes[2::3])):
        own = {f"{name}_ptr": given[f"{name}_ptrs"][i] for name in "xwby"}
        none = dict.fromkeys(("rows_ptr", "add_ptr", "h_ptr"))
        tiles = {name: value for name, value in given.items() if name.startswith("BLOCK_")}
        yield Launch(
            "_product_kernel", launch.grid, {**own, **none, **tiles, "M": M, "N": N, "K": K}
        )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


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
"""M, N, K, kept rows, kept columns."""


def launches(dtype: torch.dtype = torch.bfloat16) -> list[tuple[str, Launch]]:
    """(what is computed, a launch of it) for every case; nothing is computed."""
    return [entry for case in CASES for entry in _launches(dtype, *case)]


def _launches(
    dtype: torch.dtype, M: int, N: int, K: int, R: int | None, C: int | None
) -> list[tuple[str, Launch]]:
    linear = importlib.import_module("slimkern.ops.indexed_linear.triton")
    gemm = importlib.import_module("slimkern.ops._gemm")

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    kept = [None if n is None else meta(n, dtype=torch.int64) for n in (R, C)]
    r, c = N if R is None else R, K if C is None else C
    x, gy, w = meta(M, c), meta(M, r), meta(N, K)
    narrow = meta(r, c)
    calls: dict[str, Callable[[], Any]] = {
        "fwd": lambda: linear.indexed_linear_fwd(x, w, meta(N), *kept),
        "dx": lambda: linear.indexed_linear_dx(gy, w, *kept),
        "dW": lambda: linear.indexed_linear_dw(gy, x, *kept, N, K),
        "db": lambda: linear.indexed_linear_db(gy, kept[0], N),
        "gated": lambda: gemm.gated_product(x, narrow, narrow, None, None, activation="silu"),
    }
    kinds = "".join(f", {n} {what}" for n, what in ((R, "rows"), (C, "columns")) if n)
    entries = []
    for name, call in calls.items():
        with recorded() as found:
            call()
        entries += [(f"{name}, {M} x {K} -> {N}{kinds}", launch) for launch in found]
    return entries


def table(found: Sequence[tuple[str, Launch]], precision: Precision) -> str:
    """Markdown: a row per launch. A bound is that of the ideal traffic."""
    head = ["", "kernel", "grid", "GFLOP", "MB, ideal", "MB, tiled"]
    head += [f"bound on {name}, us" for name in GPUS]
    lines = [head, ["---"] * 3 + ["---:"] * (len(head) - 3)]
    for what, launch in found:
        cost = traffic(launch)
        bounds = roofline(cost.flops, cost.ideal, precision)
        figures = [cost.flops / 1e9, cost.ideal / 1e6, cost.tiled / 1e6]
        figures += [seconds * 1e6 for seconds in bounds.values()]
        grid = " x ".join(map(str, launch.grid))
        lines.append([what, launch.kernel.strip("_"), grid, *(f"{f:.3g}" for f in figures)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_traffic", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.parse_args(arguments)
    os.environ.setdefault("TRITON_INTERPRET", "1")  # nothing is launched: no compiler is needed
    print("Bounds from the peaks of data sheets, bfloat16; nothing here was measured.\n")
    print(table(launches(), "bf16"))
    print("\n" + "\n".join(f"- {name}: {gpu.source}" for name, gpu in GPUS.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
