"""The instruction sets: detection, the choice, and every one of them against fp64."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
from op_cases import CASES, IDS, Case, assert_within_eager_error, make_inputs, run_module

from slimkern import cpu
from slimkern.ops.indexed_linear import cpu as kernels

NAMES = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")


@pytest.fixture
def restore():
    before = cpu.isa()
    yield
    cpu.set_isa(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("isa", cpu.available_isas())
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_isa(case, isa, dtype, restore):
    cpu.set_isa(isa)
    assert cpu.isa() == isa
    inputs = make_inputs(case, dtype)
    assert_within_eager_error(run_module(kernels, inputs), inputs)


@pytest.mark.parametrize("isa", cpu.available_isas())
def test_bf16_is_rounded_to_nearest_even(isa, restore):
    """Multiplying by one stores the exact sum: its rounding is torch's, NaN and infinity too."""
    cpu.set_isa(isa)
    bits = torch.arange(0, 2**16, 7, dtype=torch.int32)
    exact = (bits << 16 | 0x8000).view(torch.float32)  # halfway between two bf16 numbers
    high = exact.bfloat16()
    low = (exact - high.float()).bfloat16()
    x = torch.stack([high, low], 1)
    if isa in ("avx512_bf16", "amx"):  # bfloat16 units read denormals as zeros
        least = torch.finfo(torch.float32).tiny
        normal = ((x.float().abs() >= least) | (x == 0) | x.isnan()).all(1)
        assert normal.float().mean() > 0.9
        x, high, low = x[normal], high[normal], low[normal]
    got = kernels.indexed_linear_fwd(x, torch.ones(1, 2).bfloat16(), None, None, None)[:, 0]
    want = (high.float() + low.float()).bfloat16()
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_names_and_order():
    available = cpu.available_isas()
    assert available[0] == "scalar"
    assert available == tuple(name for name in NAMES if name in available)
    assert tuple(cpu.features()) == NAMES
    assert all(cpu.features()[name] for name in available)


@pytest.mark.skipif(not os.path.exists("/proc/cpuinfo"), reason="the system has no /proc/cpuinfo")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="not an x86-64 machine")
def test_detection_agrees_with_the_kernel():
    with open("/proc/cpuinfo", encoding="utf-8") as stream:
        flags = set(next(line for line in stream if line.startswith("flags")).split())
    needed = {
        "avx2": {"avx2", "fma", "f16c"},
        "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
        "avx512_bf16": {"avx512_bf16"},
        "amx": {"amx_tile", "amx_bf16"},
    }
    for name, names in needed.items():
        if name != "amx" or not names <= flags:  # the system may still refuse the tiles
            assert cpu.features()[name] == (names <= flags), name


def test_set_isa_of_an_absent_one():
    before = cpu.isa()
    for name in (*(n for n in NAMES if n not in cpu.available_isas()), "sse9", ""):
        with pytest.raises(ValueError, match=f"isa is '{name}'; this machine accepts: scalar"):
            cpu.set_isa(name)
    assert cpu.isa() == before


def _isa_in_a_new_process(value):
    code = "from slimkern import cpu; print(cpu.isa())"
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"SLIMKERN_ISA": value},
        capture_output=True,
        text=True,
    )


def test_environment_override():
    assert _isa_in_a_new_process("scalar").stdout.strip() == "scalar"
    refused = _isa_in_a_new_process("avx1024")
    assert refused.returncode != 0
    assert "SLIMKERN_ISA is 'avx1024'; this machine accepts: scalar" in refused.stderr


def test_threads_follow_torch():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert cpu.threads() == 3
    finally:
        torch.set_num_threads(before)


def test_scratch_is_checked():
    """The C++ side takes addresses on trust, but not their sizes."""
    from slimkern.ops import _native

    i = make_inputs(Case((17,), 63, 130), torch.float64)
    x, w, y = i.x.detach(), i.weight.detach(), torch.zeros(17, 63, dtype=torch.float64)
    views = (_native.mat(x), _native.transposed(_native.mat(w)), _native.mat(y))
    needed = _native.gemm_scratch(17, 63, 130, 1)
    with pytest.raises(ValueError, match=f"scratch holds 3 elements, gemm needs {needed}"):
        _native.gemm(*views, _native.NO_VECTOR, 17, 63, 130, 1, 0, 3)
    with pytest.raises(IndexError, match="a length of 64 exceeds the 63 that are there"):
        _native.gemm(*views, _native.NO_VECTOR, 17, 64, 130, 1, 0, 0)


def test_plain_linears_check_their_arguments():
    from slimkern.ops import _native

    x, w = torch.zeros(17, 130), torch.zeros(63, 130)
    call = (_native.DTYPES[torch.float32], _native.MATHS["fp32"], 17, 63, 130)
    rows, view = (x.data_ptr(), 130), _native.mat(w)

    def linear(call, bits, scratch=(0, 0)):
        arguments = (call, rows, view, _native.NO_VECTOR, bits, False, 0)
        _native.plain_linear(*arguments, 1, scratch)

    everything = (0, 0, 0, 1, 1, 0, 0)
    bits = torch.zeros(16, 17, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"scratch holds 3 bytes; accepted: at least"):
        linear(call, everything, (0, 3))
    with pytest.raises(IndexError, match="a length of 64 exceeds the 63 that are there"):
        linear((*call[:3], 64, 130), everything)
    with pytest.raises(ValueError, match=r"bits is \[16, 17\]; accepted: \[16, 9\]"):
        linear(call, (bits.data_ptr(), 16, 17, 4, 2, 63, 130))
    with pytest.raises(ValueError, match="a masked weight is gathered, or its mask has other"):
        linear(call, (bits.data_ptr(), 16, 17, 4, 1, 62, 130))
    with pytest.raises(ValueError, match="float32 products; accepted: bf16"):
        linear((_native.DTYPES[torch.bfloat16], *call[1:]), everything)
