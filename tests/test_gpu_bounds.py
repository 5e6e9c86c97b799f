"""Bounds by data sheet, and what kernels move by their own launch parameters."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_bounds
from bench.gpu_bounds import GPUS, roofline

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from bench import gpu_traffic
from bench.gpu_launches import Launch, launches, recorded
from bench.gpu_shapes import GROUPED, ROWS, SHAPES
from bench.gpu_traffic import table, traffic
from slimkern import ops
from slimkern.ops import _gemm, _gemm_kernels


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_the_slower_of_products_and_traffic_binds():
    # 4096^3 in bfloat16: 139 us of products on an H100, 30 us of traffic.
    many = roofline(2.0 * 4096**3, 3 * 4096**2 * 2, "bf16")
    assert many["H100"] == pytest.approx(2.0 * 4096**3 / 989.4e12)
    few = roofline(2.0 * 4096**2, 4096**2 * 2, "bf16")  # one token
    assert few["H100"] == pytest.approx(4096**2 * 2 / 3.35e12)
    assert few["H200"] < few["H100"]
    assert many["H200"] == many["H100"]


@pytest.mark.parametrize("name", GPUS)
def test_narrower_products_are_faster_and_every_peak_has_a_source(name):
    gpu = GPUS[name]
    peaks = [gpu.flops[p] for p in ("fp32", "fp32-high", "bf16")]
    assert peaks == sorted(peaks)
    assert gpu.flops["fp32-medium"] == gpu.flops["bf16"]
    assert 1e12 < gpu.bandwidth < 1e13
    assert "data sheet" in gpu.source


def test_a_bound_of_nonsense_is_refused():
    with pytest.raises(ValueError, match="flops is -1"):
        roofline(-1.0, 0.0, "bf16")
    with pytest.raises(ValueError, match="precision is 'fp8'"):
        roofline(1.0, 0.0, "fp8")  # type: ignore[arg-type]


def test_a_row_of_results_has_the_bound_of_its_work():
    row = {"flops": 1e12, "bytes": 1e6, "precision": "fp32"}
    assert gpu_bounds.of_row(row)["A100"] == pytest.approx(1 / 19.5)  # type: ignore[arg-type]


def product_launch(M: int, N: int, K: int, rows: int | None = None) -> Launch:
    index = None if rows is None else meta(rows, dtype=torch.int64)
    with recorded() as found:
        _gemm.product(meta(M, K), meta(N, K), meta(N), index)
    (launch,) = found
    return launch


def test_a_product_is_counted_from_its_own_tiles():
    M, N, K, R = 1000, 3072, 768, 614
    launch = product_launch(M, N, K, R)
    cost = traffic(launch)
    tiles_m = -(-M // launch.arguments["BLOCK_M"])
    tiles_n = -(-R // launch.arguments["BLOCK_N"])
    assert launch.grid == (tiles_m * tiles_n,)
    assert cost.flops == 2 * M * R * K  # of the kept rows alone
    x, w, y, vectors = M * K * 2, R * K * 2, M * R * 2, R * 2 + R * 8
    assert cost.ideal == x + w + y + vectors
    assert cost.tiled == x * tiles_n + w * tiles_m + y + vectors * tiles_m


def test_larger_tiles_move_less():
    launch = product_launch(4096, 3072, 768)

    def tiled(side: int) -> float:
        arguments = {**launch.arguments, "BLOCK_M": side, "BLOCK_N": side}
        return traffic(Launch(launch.kernel, launch.grid, arguments)).tiled

    assert tiled(128) < tiled(64) < tiled(32)


def test_slices_of_a_weight_gradient_are_written_and_read_again():
    with recorded() as found:
        _gemm.product_dw(meta(4096, 320), meta(4096, 384))
    first, second = found
    slices = first.grid[1]
    assert slices > 1
    assert traffic(first).flops == 2 * 4096 * 320 * 384
    part = slices * 320 * 384 * 4
    assert traffic(first).ideal == 4096 * (320 + 384) * 2 + part
    assert traffic(second).ideal == part + 320 * 384 * 2


SIDE = frozenset({"bits_ptr", "list_ptr", "counts_ptr", "shift_ptr"})
"""Pointers that are not counted: bits and lists of masks, some thousandths of the weight, and a
bias's copy."""


def kernels() -> dict[str, Any]:
    """Every kernel of slimkern's, by name."""
    found = {}
    for path in sorted(Path(ops.__path__[0]).rglob("*.py")):
        if "_kernel(" not in path.read_text() or path.parent.name == "__pycache__":
            continue
        parts = path.relative_to(ops.__path__[0]).with_suffix("").parts
        module = importlib.import_module(".".join(["slimkern.ops", *parts]))
        members = vars(module).items()
        found |= {n: k for n, k in members if n.endswith("_kernel") and hasattr(k, "fn")}
    return found


def test_a_grouped_launch_costs_what_its_products_cost():
    wide, narrow = ((64, 96, 128), (64, 40, 128))
    tensors = [(meta(M, K), meta(N, K), None, meta(M, N)) for M, N, K in (wide, narrow)]
    names = ("x_ptrs", "w_ptrs", "b_ptrs", "y_ptrs")
    arguments = dict(zip(names, zip(*tensors))) | {"sizes": (*wide, *narrow)}
    tiles = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}
    cost = traffic(Launch(GROUPED, (12,), arguments | tiles))
    assert cost.flops == 2 * 64 * 128 * (96 + 40)
    assert cost.ideal == 2 * sum(M * K + N * K + M * N for M, N, K in (wide, narrow))
    assert cost.tiled > cost.ideal


@pytest.mark.parametrize("kept", [0.0, 0.25, 1.0])
def test_what_a_mask_skips_is_neither_moved_nor_multiplied(kept):
    x, w, y = meta(128, 64), meta(96, 64), meta(128, 96)
    arguments = {"x_ptr": x, "w_ptr": w, "b_ptr": None, "y_ptr": y, "M": 128, "P": 96, "R": 64}
    arguments |= {"BLOCK_M": 64, "BLOCK_P": 32}
    cost = traffic(Launch("_block_masked_product_kernel", (6,), arguments), kept)
    assert cost.flops == kept * 2 * 128 * 96 * 64
    assert cost.ideal == 2 * (128 * 64 + kept * 96 * 64 + 128 * 96)
    assert cost.tiled == 2 * (kept * (3 * 128 * 64 + 2 * 96 * 64) + 128 * 96)


def test_every_kernel_stands_in_one_of_the_tables():
    """A bound of what is not understood would be a guess."""
    assert set(kernels()) == {*SHAPES, *ROWS, GROUPED}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_names_arguments_of_its_kernel(name):
    shape, names = SHAPES[name], set(inspect.signature(kernels()[name].fn).parameters)
    used = {*shape.operands, *shape.tile, *shape.tile.values()}
    used |= {size for sizes in (*shape.operands.values(), *shape.products) for size in sizes}
    assert {n for n in used if not n.startswith("#")} <= names
    assert shape.outputs | shape.masked | shape.skipped <= set(shape.operands)
    pointers = {n for n in names if n.endswith(("_ptr", "_desc"))}
    indices = {n for n in pointers if n.endswith("_ids_ptr")}  # optional, a number for each token
    assert pointers - SIDE - indices == set(shape.operands)


def test_every_kernel_is_launched_but_for_descriptors():
    found = launches()
    missing = set(kernels()) - {launch.kernel for _, launch in found}
    assert all("descriptor" in name for name in missing), missing
    for what, launch in found:
        cost = traffic(launch)
        assert 0 < cost.ideal <= cost.tiled, what
        assert (cost.flops > 0) == bool(
            launch.kernel == GROUPED or (launch.kernel in SHAPES and SHAPES[launch.kernel].products)
        ), what


def test_one_weight_handed_over_three_times_is_read_once():
    kept = importlib.import_module("slimkern.ops.kept_linear.triton")
    index = meta(320, dtype=torch.int64)

    def ideal(count: int) -> float:
        with recorded() as found:
            kept.kept_weights([meta(768, 768)] * count, [None] * count, [index] * count,
                              None, torch.bfloat16, 64)  # fmt: skip
        return traffic(found[0]).ideal

    assert ideal(1) == 2 * (320 * 768) * 2 + 320 * 8
    assert ideal(3) == 3 * ideal(1)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(KeyError, match="_new_kernel"):
        traffic(Launch("_new_kernel", (1,), {"x_ptr": meta(3)}))


def test_what_is_recorded_is_not_run_and_the_kernels_come_back():
    before = _gemm_kernels._product_kernel
    with recorded() as found:
        _gemm.product(meta(17, 63), meta(130, 63))
    assert [launch.kernel for launch in found] == ["_product_kernel"]
    assert _gemm_kernels._product_kernel is before


def test_the_table_says_what_it_is(capsys):
    assert gpu_traffic.main([]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Bounds from the peaks of data sheets")
    assert "nothing here was measured" in text
    for part in ("fwd", "dx", "dW", "db", "gated"):
        assert f"| {part}, 4096 x 768 -> 3072, 614 rows |" in text
    assert all(f"bound on {name}, us" in text and GPUS[name].source in text for name in GPUS)
    assert len(table(launches(), "bf16").splitlines()) == len(launches()) + 2
