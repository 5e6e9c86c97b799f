"""Every Triton kernel is compiled for GPUs that are not here, and what comes out is read.

The launchers run on tensors without memory, and a recorder in the place of each kernel notes what
they would have launched; that, not a list kept here, is compiled. Compiling needs kernels that are
not interpreted, so it happens in processes of its own: this file, run as a script.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed on this platform")

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED = {"sm_80": 99 << 10, "sm_90": 99 << 10, "sm_100": 99 << 10, "gfx942": 64 << 10}
M, N, K = 8192, 3072, 768  # of a BERT-base layer; the kept widths are below
MATRIX = r"mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma"
GEMMS = ("fwd", "bwd_dx", "bwd_dw")


# ---- the worker --------------------------------------------------------------------------------


class Recorder:
    """Stands for a kernel: ``recorder[grid](...)`` notes the arguments."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, tuple, dict]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert 0 < grid[0] < 2**31
        assert all(0 < size < 2**16 for size in grid[1:])
        return lambda *args, **kwargs: self.launches.append((self.kernel, args, kwargs))


def variants() -> Iterator[tuple[str, int, tuple[bool, bool], int]]:
    """(dtype, index in its table of tiles, (has rows, has cols), kept width) to compile."""
    for i in range(4):
        for has_rows in (False, True):
            yield "fp16", i, (has_rows, False), 308
            yield "fp16", i, (has_rows, True), 308
        yield "fp16", i, (True, False), 307
        for dtype in ("fp32", "tf32"):
            yield dtype, i, (True, False), 308
            yield dtype, i, (False, True), 307
    for i in range(3):
        yield "fp16", i, (True, True), 307
        yield "bf16", i, (True, False), 320
        yield "bf16", i, (False, True), 320


def launches_of(kernels: Any, variant: tuple) -> list[tuple[Any, tuple, dict]]:
    """What a forward and a backward launch, with tile ``i`` of the table each of them takes."""
    import torch

    dtype_name, i, (has_rows, has_cols), width = variant
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(dtype_name, torch.float32)
    torch.set_float32_matmul_precision("high" if dtype_name == "tf32" else "highest")

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    launches: list[tuple[Any, tuple, dict]] = []
    names = [name for name in vars(kernels) if name.endswith("_kernel")]
    originals = {name: getattr(kernels, name) for name in (*names, "choose_tile")}
    kernels.choose_tile = lambda tiles, *args, **kwargs: tiles[min(i, len(tiles) - 1)]
    for name in names:
        setattr(kernels, name, Recorder(originals[name], launches))
    index = meta(width, dtype=torch.int64)
    rows, cols = (index if has_rows else None), (index if has_cols else None)
    R, C = (width if has_rows else N), (width if has_cols else K)
    try:
        kernels.indexed_linear_fwd(meta(M, C), meta(N, K), meta(N), rows, cols)
        kernels.indexed_linear_dx(meta(M, R), meta(N, K), rows, cols)
        for tokens in (M, 63) if dtype_name == "fp16" else (M,):  # in slices, and in one
            kernels.indexed_linear_dw(meta(tokens, R), meta(tokens, C), rows, cols, N, K)
            if not has_cols:
                kernels.indexed_linear_db(meta(tokens, R), rows, N)
    finally:
        for name, original in originals.items():
            setattr(kernels, name, original)
    return launches


def source_of(kernel: Any, args: tuple, kwargs: dict) -> tuple[Any, dict[str, int]]:
    """A launch as the compiler takes it, specialized as Triton's launcher specializes it."""
    import torch
    from triton.compiler import ASTSource

    pointers = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
    pointers[torch.int64] = "*i64"
    options = {name: kwargs[name] for name in ("num_warps", "num_stages")}
    values = dict(zip(kernel.arg_names, args))
    values |= {name: value for name, value in kwargs.items() if name not in options}
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = pointers[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif name in kwargs or value is None or value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options


def figures(compiled: Any) -> dict[str, Any]:
    """Registers, spills, shared memory and instructions of a compiled kernel."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]

        def field(name: str) -> int:
            found = re.search(rf"\.{name}:\s+(\d+)", text)
            assert found is not None, name
            return int(found[1])

        spills = field("vgpr_spill_count") + field("sgpr_spill_count")
        spills += field("private_segment_fixed_size")
        registers = field("vgpr_count")
    else:
        import triton

        text = compiled.asm["ptx"]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(compiled.asm["cubin"])
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
            usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert found is not None, usage
        registers, spills = int(found[1]), int(found[2]) + int(found[3])
    return {
        "registers": registers,
        "spills": spills,
        "shared": compiled.metadata.shared,
        "matrix": sorted(set(re.findall(MATRIX, text))),
        "async_bytes": sorted({int(n, 16) for n in re.findall(r"cp\.async\.c.*, 0x(\w+),", text)}),
    }


def compile_all(names: list[str]) -> None:
    """Prints one line of JSON for each kernel compiled for each of the targets named."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget

    from slimkern.ops import _tile
    from slimkern.ops.indexed_linear import triton as kernels

    seen = set()
    for name in names:
        target = GPUTarget(*TARGETS[name])
        _tile.ON_AMD = target.backend == "hip"
        for variant in variants():
            if variant[0] == "tf32" and _tile.ON_AMD:
                continue
            for kernel, args, kwargs in launches_of(kernels, variant):
                source, options = source_of(kernel, args, kwargs)
                key = (name, source.hash(), str(options))
                if key in seen:
                    continue
                seen.add(key)
                result = figures(compile_kernel(source, target=target, options=options))
                short = kernel.__name__.removeprefix("_indexed_linear_").removesuffix("_kernel")
                flags = [flag for flag in kwargs if flag.startswith("HAS_") and kwargs[flag]]
                tile = [kwargs[block] for block in kwargs if block.startswith("BLOCK")]
                about = {"target": name, "kernel": short, "dtype": variant[0], "flags": flags}
                about |= {"tile": tile, "width": variant[3], **options}
                print(json.dumps(about | result), flush=True)


# ---- the tests ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """The figures of every kernel on every target; two processes share the targets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    shares = (["sm_80", "gfx942"], ["sm_90", "sm_100"])
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, *share],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for share in shares
    ]
    lines: list[str] = []
    for worker in workers:
        out, err = worker.communicate(timeout=900)
        assert worker.returncode == 0, err[-4000:]
        lines += out.splitlines()
    return [json.loads(line) for line in lines]


def _on(compiled: list[dict[str, Any]], target: str) -> list[dict[str, Any]]:
    found = [row for row in compiled if row["target"] == target]
    kinds = {(row["kernel"], row["dtype"]) for row in found}
    wanted = {(kernel, dtype) for kernel in GEMMS for dtype in ("fp32", "fp16", "bf16")}
    assert wanted | {("bwd_db", "fp16"), ("bwd_reduce", "fp16")} <= kinds
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_no_register_is_spilled(compiled, target):
    spilled = [row for row in _on(compiled, target) if row["spills"]]
    assert not spilled, "\n".join(map(str, spilled))


@pytest.mark.parametrize("target", TARGETS)
def test_the_matrix_units_do_the_work(compiled, target):
    for row in _on(compiled, target):
        if row["kernel"] in GEMMS and (row["dtype"] != "fp32" or target == "gfx942"):
            assert row["matrix"], row
        elif row["kernel"] in GEMMS:
            assert not row["matrix"], f"full float32 precision was asked for: {row}"


@pytest.mark.parametrize(
    ("target", "instruction"), [("sm_90", "wgmma.mma_async"), ("sm_100", "tcgen05.mma")]
)
def test_large_tiles_use_the_newest_matrix_instruction(compiled, target, instruction):
    rows = [row for row in _on(compiled, target) if row["dtype"] in ("fp16", "bf16")]
    large = [row for row in rows if row["kernel"] in GEMMS and row["tile"][0] >= 64]
    assert large
    for row in large:
        assert row["matrix"] == [instruction], row


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_suffices(compiled, target):
    for row in _on(compiled, target):
        assert row["shared"] <= SHARED[target], row


def test_widths_that_are_no_multiple_of_16_are_loaded_wide(compiled):
    """308 halves are 616 bytes: 8 at a time, and 16 along the full-size dimension."""
    rows = [row for row in _on(compiled, "sm_80") if row["dtype"] == "fp16"]
    rows = [row for row in rows if row["width"] == 308 and row["flags"] == ["HAS_ROWS"]]
    wide = [row for row in rows if row["kernel"] == "bwd_dx"]
    assert wide
    for row in wide:
        assert row["async_bytes"] == [8, 16], row


if __name__ == "__main__":
    compile_all(sys.argv[1:] or list(TARGETS))
