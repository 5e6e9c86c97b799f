"""Every Triton kernel is compiled for GPUs that are not here, and what comes out is judged.

What is compiled is listed in ``tests/compile/cases``; ``python -m tests.compile --full`` compiles
all of it, this file the configurations that are chosen by default, the largest and the smallest.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from tests.compile import amdgcn, cases, matrix, sass
from tests.compile.cases import Promise
from tests.compile.checks import complaints, never_launched
from tests.compile.code import Figures, figures_of
from tests.compile.matrix import Row
from tests.compile.table import table
from tests.compile.targets import TARGETS

SPILLING = "gemm: product fp16"  # a case whose largest tile fills the registers


@pytest.fixture(scope="module")
def compiled() -> tuple[list[Row], set[str]]:
    return matrix.run()


@pytest.mark.parametrize("target", TARGETS)
def test_the_machine_code_is_what_was_intended(compiled, target):
    rows = [row for row in compiled[0] if row.target == target]
    assert rows
    promises = cases.promises()
    wrong = [text for row in rows for text in complaints(row, promises)]
    assert not wrong, "\n".join(wrong)


def test_every_kernel_is_launched_by_a_case_and_every_promise_is_of_a_kernel(compiled):
    rows, existing = compiled
    assert not never_launched(rows, existing)
    assert set(cases.promises()) <= existing
    assert never_launched(rows, existing | {"_forgotten_kernel"}) == {"_forgotten_kernel"}


def test_a_tile_that_is_too_large_is_found():
    """Twice the largest tile on both sides: its sums alone take every register."""
    rows, _ = matrix.run_worker("sm_80", "--double", "--only", SPILLING)
    found = [text for row in rows for text in complaints(row, cases.promises())]
    assert any("spills" in text for text in found), found


def test_a_launch_that_does_not_compile_is_found():
    row = Row("sm_80", "gemm", "product", "fp16", None, "", error="CompilationError: at 1:2")
    assert complaints(row, {}) == [f"{row}: CompilationError: at 1:2"]


GOOD = Figures(96, 0, 64 << 10, 8, 0, ["HGMMA.64x128x16.F32"], {"matrix": 4}, {16: 8})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, ""),
        ({"spilled": 8}, "spills 8 bytes"),
        ({"loop": {"matrix": 4, "spill": 1}}, "local memory is used in its main loop"),
        ({"loop": {"matrix": 4, "address": 90, "lane move": 5}}, "move spilled scalar"),
        ({"loop": {"matrix": 4, "address": 92, "lane move": 4}}, ""),
        ({"shared": 228 << 10, "warps": 4}, "bytes of shared memory of 232448"),
        ({"tensor_memory": 513}, "columns of tensor memory"),
        ({"registers": 168}, "1 blocks of 8 warps fit a multiprocessor, 2 are intended"),
        ({"shared": 114 << 10}, "1 blocks of 8 warps fit a multiprocessor, 2 are intended"),
        ({"matrix": []}, "has no matrix instruction"),
        ({"matrix": ["HMMA.16816.F32"]}, "where HGMMA is to do the work"),
        ({"loads": {}}, "has no 16-byte load"),
        ({"loads": {}, "tma": True}, ""),
        ({"loads": {4: 2, 16: 8}}, "loads narrower than 16 bytes in its main loop: {4: 2}"),
    ],
)
def test_each_check_can_fail(change, complaint):
    constants = {"BLOCK_M": "128", "BLOCK_N": "128", "BLOCK_K": "64"}
    row = Row("sm_90", "op", "case", "fp16", 0, "", "_k_kernel", constants, (), 2)
    row = replace(row, figures=replace(GOOD, **change))
    found = complaints(row, {"_k_kernel": Promise(blocks=2)})
    assert bool(found) == bool(complaint), found
    assert complaint in "".join(found)


def test_full_precision_and_unpromised_kernels_are_judged():
    constants = {"BLOCK_M": "64", "BLOCK_N": "64", "BLOCK_K": "16"}
    row = Row("sm_90", "op", "case", "fp32", 0, "", "_k_kernel", constants, (), 4, GOOD)
    assert "full float32 precision was asked for" in complaints(row, {"_k_kernel": Promise()})[0]
    assert "KERNELS of its cases does not hold it" in complaints(row, {})[0]


SASS = """
.text._k_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.64 R2, desc[UR8][R18.64] ;
.L_x_1:
        /*0020*/              @!P0 LDGSTS.E.BYPASS.128 [R85+0x2000], desc[UR8][R18.64], P3 ;
.L_x_2:
        /*0030*/                   HGMMA.64x128x16.F32 R24, gdesc[UR8], R24, gsb0 ;
        /*0040*/                   LDG.E.U16 R2, desc[UR8][R18.64] ;
        /*0050*/              @!P1 BRA `(.L_x_2) ;
        /*0060*/                   STL [R1], R2 ;
        /*0070*/              @!P1 BRA `(.L_x_1) ;
        /*0080*/                   HFMA2.MMA R133, -RZ, RZ, 0, 0 ;
.L_x_3:
        /*0090*/                   BRA `(.L_x_3);
"""


def test_the_main_loop_of_sass_is_the_innermost_that_multiplies():
    code, loops = sass.parse(SASS)
    figures = figures_of(code, loops, registers=1, spilled=0, shared=0, warps=4)
    assert figures.loop == {"matrix": 1, "global load": 1, "branch": 1}
    assert figures.loads == {2: 1}
    assert figures.matrix == ["HGMMA.64x128x16.F32"]
    assert sass.resources(" REG:158 STACK:8 SHARED:1024 LOCAL:16 CONSTANT[0]:608") == (158, 24)
    with pytest.raises(ValueError, match="said nothing of registers"):
        sass.resources("")


AMDGCN = """
	s_load_dwordx2 s[2:3], s[0:1], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	global_load_dwordx4 v[66:69], v[4:5], off
	s_cbranch_execz .LBB0_3
; %bb.2:                                ;   in Loop: Header=BB0_1 Depth=1
.Ltmp1:
	v_mfma_f32_32x32x8_f16 v[18:33], v[70:71], v[64:65], v[18:33]
	s_cbranch_scc1 .LBB0_1
.LBB0_4:                                ; %Flow
	buffer_store_dword v1, off
.LBB0_3:                                ;   in Loop: Header=BB0_1 Depth=1
	global_load_dword v66, v[4:5], off
	s_branch .LBB0_1
"""


def test_the_loop_of_amd_s_code_is_read_from_its_comments():
    code, loops = amdgcn.parse(AMDGCN)
    figures = figures_of(code, loops, registers=1, spilled=0, shared=0, warps=4)
    assert figures.loads == {4: 1, 16: 1}
    assert figures.loop == {"branch": 3, "global load": 2, "matrix": 1}


def test_the_table_has_a_line_per_kernel_dtype_and_tile():
    constants = {"BLOCK_M": "128", "BLOCK_N": "128"}
    row = Row("sm_90", "op", "a", "fp16", 0, "", "_k_kernel", constants, (), 2, GOOD)
    rows = [row, replace(row, case="b"), replace(row, dtype="bf16")]
    lines = table(rows, "sm_90").splitlines()
    assert len(lines) == 4
    assert lines[3].startswith("| `k` | fp16 | 128x128 | 8 | 96 | 64 | 2 | 4 | 0 |")
    assert lines[3].endswith("| 8 of 8 | HGMMA |")


BLOCKS = [
    ("sm_90", (168, 64 << 10, 8), 1),  # registers: 8 * 32 * 168 twice is too much
    ("sm_90", (128, 64 << 10, 8), 2),
    ("sm_90", (32, 100 << 10, 4), 2),  # shared memory
    ("sm_90", (32, 0, 4), 16),  # warps
    ("gfx942", (128, 32 << 10, 8), 2),
    ("gfx942", (512, 0, 4), 1),
]


@pytest.mark.parametrize(("target", "of", "count"), BLOCKS)
def test_resident_blocks(target, of, count):
    assert TARGETS[target].blocks(*of) == count
