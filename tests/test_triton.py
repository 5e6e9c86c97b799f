"""The Triton kernels against fp64: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from op_cases import CASES, IDS, Case, assert_within_eager_error, make_inputs, run, run_module

from slimkern.ops import indexed_linear

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from triton_cases import DEVICES, DTYPE_IDS, DTYPES, GPU, INTERPRETED, skip_interpreted_bf16

from slimkern.ops import _gemm_configs, _tile
from slimkern.ops.indexed_linear import triton as kernels

SMALL = Case((17,), 63, 130, R=17, C=63)


def op(x, weight, bias, rows, cols):
    return indexed_linear(x, weight, bias, rows, cols, backend="triton")


def test_a_machine_without_a_gpu_interprets():
    """Otherwise everything below would be skipped without a word."""
    assert GPU or (INTERPRETED and os.environ["TRITON_INTERPRET"] == "1")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_result_is_within_eager_error(case, dtype, device, poisoned):
    skip_interpreted_bf16(dtype, device)
    inputs = make_inputs(case, dtype, device)
    assert_within_eager_error(run_module(kernels, inputs), inputs)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU rounds, and is held to the bound above")
@pytest.mark.parametrize("case", [SMALL, Case((130,), 17, 63)], ids=lambda case: case.id)
def test_bf16_in_the_interpreter_is_its_cut_off_float32(case):
    """Operands are widened exactly, so one cut (below one unit in the last place) is all."""
    inputs = make_inputs(case, torch.bfloat16)
    got = run_module(kernels, inputs)
    want = run_module(kernels, inputs.map(torch.Tensor.float))
    for name in ("y", "dx", "dw", "db"):
        low, full = getattr(got, name).float(), getattr(want, name)
        # 2^-7 is bfloat16's unit in the last place relative to the number's power of two.
        assert ((low - full).abs() <= 2.0**-7 * full.abs()).all(), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "case",
    [Case((3, 5, 7), 63, 17, R=9, C=8), Case((2, 17), 63, 130, R=17, C=63, layout="sliced")],
    ids=lambda case: case.id,
)
def test_through_the_op_and_autograd(case, device):
    inputs = make_inputs(case, torch.float32, device)
    assert_within_eager_error(run(op, inputs), inputs)


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_is_exactly_zero_outside_the_kept_part(device):
    inputs = make_inputs(SMALL, torch.float32, device)
    result = run(op, inputs)
    kept = torch.zeros(63, 130, dtype=torch.bool, device=device)
    kept[inputs.rows[:, None], inputs.cols] = True
    assert (result.dw[~kept] == 0).all()
    assert (result.dw[kept] != 0).all()
    rows = torch.zeros(63, dtype=torch.bool, device=device)
    rows[inputs.rows] = True
    assert (result.db[~rows] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
def test_expanded_gradient(device):
    """``y.sum()`` sends a gradient whose strides are zero."""
    inputs = make_inputs(SMALL, torch.float32, device)
    one = torch.ones((), device=device)
    inputs = replace(inputs, grad_y=one.expand(inputs.grad_y.shape))
    assert_within_eager_error(run_module(kernels, inputs), inputs)


@pytest.mark.parametrize("device", DEVICES)
def test_many_tokens_are_summed_in_slices(device, poisoned):
    """Few output tiles and many tokens: the weight's gradient is cut into slices, then added."""
    case = Case((1030,), 40, 24, R=20, C=9)
    inputs = make_inputs(case, torch.float32, device)
    first = run_module(kernels, inputs)
    assert_within_eager_error(first, inputs)
    again = run_module(kernels, inputs)
    for name in ("y", "dx", "dw", "db"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name


@pytest.mark.parametrize("device", DEVICES)
def test_an_unselected_nan_does_not_leak(device):
    weight = torch.full((70, 90), float("nan"), device=device)
    rows = torch.tensor([1, 4, 69], device=device)
    cols = torch.tensor([0, 3, 77], device=device)
    weight[rows[:, None], cols] = 1.0
    bias = torch.full((70,), float("nan"), device=device)
    bias[rows] = 2.0
    x = torch.ones(2, 3, device=device)
    assert torch.equal(op(x, weight, bias, rows, cols), torch.full((2, 3), 5.0, device=device))
    grad_y = torch.ones(2, 3, device=device)
    dx = kernels.indexed_linear_dx(grad_y, weight, rows, cols)
    assert torch.equal(dx, torch.full((2, 3), 3.0, device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_a_tail_does_not_read_the_next_row(device):
    """Sizes that no block divides, in a buffer whose neighbours are NaN."""
    wide = torch.full((19, 140), float("nan"), device=device)
    x = wide[1:18, 3:133]
    x.fill_(1.0)
    weight = torch.full((63, 140), float("nan"), device=device)[:, 5:135]
    weight.fill_(1.0)
    y = kernels.indexed_linear_fwd(x, weight, None, None, None)
    assert torch.equal(y, torch.full((17, 63), 130.0, device=device))
    dw = kernels.indexed_linear_dw(torch.ones(17, 63, device=device), x, None, None, 63, 130)
    assert torch.equal(dw, torch.full((63, 130), 17.0, device=device))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU with 12 GB of free memory")
def test_offsets_beyond_32_bits():
    if torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("needs a GPU with 12 GB of free memory")
    M, C = 2**21 + 3, 1024 + 32
    x = torch.zeros(M, C, dtype=torch.float16, device="cuda")
    x[-1] = 1.0
    weight = torch.ones(16, C, dtype=torch.float16, device="cuda")
    y = kernels.indexed_linear_fwd(x, weight, None, None, None)
    assert (y[-1] == C).all()
    assert (y[:-1] == 0).all()
    dw = kernels.indexed_linear_dw(torch.ones_like(y), x, None, None, 16, C)
    assert (dw == 1).all()


def test_other_dtypes_are_refused():
    x, weight = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)
    message = r"has dtype torch\.float64; backend 'triton' accepts torch\.float32, torch\.float16"
    with pytest.raises(TypeError, match=message):
        kernels.indexed_linear_fwd(x, weight, None, None, None)
    with pytest.raises(TypeError, match=message):
        kernels.indexed_linear_dx(x, torch.zeros(3, 2).double(), None, None)
    with pytest.raises(TypeError, match=message):
        kernels.indexed_linear_dw(x, x, None, None, 3, 3)
    with pytest.raises(TypeError, match=message):
        kernels.indexed_linear_db(x, None, 3)


@pytest.mark.skipif(torch.version.hip is not None, reason="AMD GPUs have no TF32 to choose")
@pytest.mark.parametrize(
    ("setting", "want"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")]
)
def test_float32_follows_torchs_own_setting(setting, want):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        assert _tile.precision(torch.float32) == want
        assert _tile.precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(torch.version.hip is not None, reason="AMD GPUs have no TF32 to choose")
def test_float32_follows_the_newer_setting():
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has only the older setting")
    before = matmul.fp32_precision
    try:
        for setting in ("ieee", "tf32"):
            matmul.fp32_precision = setting
            assert _tile.precision(torch.float32) == setting
    finally:
        matmul.fp32_precision = before


def test_choice_of_tiles():
    for tiles in (_gemm_configs.HALF_TILES, _gemm_configs.NARROW_TILES, _gemm_configs.FLOAT_TILES):
        assert len(tiles) <= 8
        # Enough output for a GPU: the largest tile; a handful of tokens: the least padding.
        assert _tile.choose_tile(tiles, 1 << 14, 1 << 12) == tiles[0]
        assert _tile.choose_tile(tiles, 1, 1 << 12).a == 16
        for a in (1, 17, 63, 130, 4096):
            assert _tile.choose_tile(tiles, a, 308) in tiles
    assert [_tile.bucket(n) for n in (0, 1, 2, 3, 17, 64, 65)] == [1, 1, 2, 4, 32, 64, 128]
    assert [_tile.alignment(n, 768) for n in (768, 308, 40, 307)] == [16, 4, 8, 1]
    for programs in (1, 36, 500):
        for steps in (0, 1, 7, 128, 10_000):
            slices = _tile.splits(programs, steps)
            assert slices == 1 or (slices <= steps // 4 and slices * programs <= 264)
