"""What each kernel moves and multiplies, from the parameters it would be launched with.

For each operand of a launch two figures follow: ``ideal``, every number once; and ``tiled``, once
for each tile of the output that needs it, which is what passes between the L2 cache and the
multiprocessors. Beside them stands the bound of the data sheets' peaks, for the ideal.

    python -m bench.gpu_traffic                      # every kernel, BERT-base's shapes, markdown
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass

from torch import Tensor

from bench.gpu_bounds import GPUS, roofline
from bench.gpu_launches import Launch, launches
from bench.gpu_shapes import GROUPED, ROWS, SHAPES
from slimkern.report.speed_schema import Precision


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
        KeyError: the kernel stands in no table of ``bench/gpu_shapes.py``, or has lost an argument
            that its entry names.
    """
    if launch.kernel == GROUPED:
        parts = [traffic(problem) for problem in _problems(launch)]
        return Traffic(*(sum(figures) for figures in zip(*map(astuple, parts))))
    if launch.kernel in ROWS:
        moved = float(sum(_bytes(t) for t in launch.arguments.values() if isinstance(t, Tensor)))
        return Traffic(0.0, moved, moved)
    shape = SHAPES[launch.kernel]
    flops = sum(2.0 * math.prod(map(launch.size, sizes)) for sizes in shape.products)
    ideal = tiled = 0.0
    for name, sizes in shape.operands.items():
        given = launch.arguments[name]
        tensor = getattr(given, "base", given)  # of a tensor descriptor
        needed, value = shape.only.get(name, ("", None))
        if not isinstance(tensor, Tensor) or (needed and launch.arguments[needed] != value):
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
