"""Bounds by data sheet, and what kernels move by their own launch parameters."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest
import torch

from bench import gpu_bounds
from bench.gpu_bounds import GPUS, roofline

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from bench import gpu_traffic
from bench.gpu_shapes import SHAPES
from bench.gpu_traffic import Launch, launches, recorded, table, traffic
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


PRODUCTS = [m.name for m in pkgutil.iter_modules(ops.__path__) if m.name.startswith("_gemm")]


def test_a_grouped_launch_costs_what_its_products_cost():
    wide, narrow = ((64, 96, 128), (64, 40, 128))
    tensors = [(meta(M, K), meta(N, K), None, meta(M, N)) for M, N, K in (wide, narrow)]
    names = ("x_ptrs", "w_ptrs", "b_ptrs", "y_ptrs")
    arguments = dict(zip(names, zip(*tensors))) | {"sizes": (*wide, *narrow)}
    tiles = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32}
    cost = traffic(Launch(gpu_traffic.GROUPED, (12,), arguments | tiles))
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


def test_every_kernel_of_products_has_its_shape():
    """A kernel that none describes would count as one that goes over each tensor once."""
    modules = [importlib.import_module(f"slimkern.ops.{name}") for name in PRODUCTS]
    kernels = {
        name: kernel
        for module in modules
        for name, kernel in vars(module).items()
        if name.endswith("_kernel") and name != gpu_traffic.GROUPED
    }
    assert kernels
    assert set(kernels) <= set(SHAPES)
    for name, kernel in kernels.items():
        shape, names = SHAPES[name], inspect.signature(kernel.fn).parameters
        used = {*shape.operands, *shape.tile, *shape.tile.values()}
        used |= {size for sizes in (*shape.operands.values(), *shape.products) for size in sizes}
        assert {n for n in used if not n.startswith("#")} <= set(names), name
        pointers = {n for n in names if n.endswith(("_ptr", "_desc"))}
        assert pointers == set(shape.operands), name


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
