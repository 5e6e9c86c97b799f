"""Block masks in the Triton kernels: on a GPU where there is one, else in the interpreter."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from block_mask_cases import CASES, IDS, MaskCase, eager, make_case, make_mask, op, run_module
from op_cases import Inputs, assert_within_eager_error, run

from slimkern.nn import BlockMaskedLinear
from slimkern.ops import BlockMask, block_masked_linear

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from triton_cases import DEVICES, DTYPE_IDS, DTYPES, GPU, INTERPRETED, skip_interpreted_bf16

from slimkern.ops import _block_tiles, _tile
from slimkern.ops.block_masked_linear import triton as kernels

WAYS = {"loaded": (1 << 30, 2.0), "listed": (-1, 2.0), "dense": (-1, -1.0)}
SMALL = MaskCase(17, 63, 130, (4, 1), 0.5)
STEP = _block_tiles.STEP


@pytest.fixture
def way(request, monkeypatch):
    """One of the three ways through a product, whatever the sizes."""
    few, most = WAYS[request.param]
    monkeypatch.setattr(kernels, "_FEW_TOKENS", few)
    monkeypatch.setattr(kernels, "_MOST_KEPT", most)
    monkeypatch.setattr(kernels, "_LEAST_PROGRAMS", 0)
    return request.param


def moved(inputs: Inputs, mask: BlockMask, device: str) -> tuple[Inputs, BlockMask]:
    def there(tensor):
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        return made.copy_(tensor)

    return inputs.map(there), mask.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_result_is_within_eager_error(case, way, dtype, device, poisoned):
    skip_interpreted_bf16(dtype, device)
    if device == "cpu":
        # A sixth of the cases in each way and dtype, others in each, spares minutes.
        turn = CASES.index(case) + list(WAYS).index(way) + 2 * DTYPES.index(dtype)
        if turn % 6 or case.M >= 300:
            pytest.skip("the interpreter is slow: another dtype or way has this case")
    inputs, mask = moved(*make_case(case, dtype), device)
    result = run_module(kernels, inputs, mask)
    assert_within_eager_error(result, inputs, eager(mask))
    assert (result.dw[~mask.dense()] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("block", [(4, 1), (32, 32)], ids=str)
def test_through_the_op_and_autograd(way, block, device):
    case = MaskCase(30, 63, 130, block, 0.3, layout="sliced")
    inputs, mask = moved(*make_case(case, torch.float32), device)
    call = op(mask, "triton")
    assert_within_eager_error(run(call, inputs), inputs, eager(mask))
    folded = call(inputs.x.view(2, 3, 5, 130), inputs.weight, inputs.bias)
    assert torch.equal(folded.view(30, 63), call(inputs.x, inputs.weight, inputs.bias))


@pytest.mark.parametrize("device", DEVICES)
def test_dense_gradient(device):
    inputs, mask = moved(*make_case(SMALL, torch.float32), device)
    got, kept = run(op(mask, "triton", dense=True), inputs), run(op(mask, "triton"), inputs)
    plain = replace(inputs, weight=inputs.weight.detach().mul(mask.dense()).requires_grad_())
    assert_within_eager_error(got, plain)
    assert (got.dw != 0).all()
    assert (kept.dw[~mask.dense()] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("block", [(4, 1), (1, 1), (32, 32), (200, 1)], ids=str)
def test_what_is_masked_is_not_read(way, block, device):
    inputs, mask = moved(*make_case(MaskCase(17, 63, 130, block, 0.4), torch.float32), device)
    want = run_module(kernels, inputs, mask)
    inputs.weight.data[~mask.dense()] = float("nan")
    got = run_module(kernels, inputs, mask)
    for name in ("y", "dx", "dw"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["loaded", "listed"], indirect=True)
def test_steps_without_weights_are_not_read(way, device):
    """NaN in x and dy, where no weight of a tile, or of the whole mask, is kept."""
    N, K = 160, 192
    kept = torch.zeros(5, 6, dtype=torch.bool)
    kept[0, 1] = kept[1, 4] = kept[4, 4] = kept[4, 5] = True
    mask = BlockMask.from_blocks(kept, (32, 32), (N, K)).to(device)
    inputs, _ = moved(*make_case(MaskCase(40, N, K, (32, 32), 1.0), torch.float32), device)
    x, weight, grad_y = inputs.x.detach(), inputs.weight.detach(), inputs.grad_y
    clean = run_module(kernels, inputs, mask)
    x[:, 0:32] = x[:, 64:128] = float("nan")  # in steps 0, 2 and 3 nobody keeps anything
    grad_y[:, 64:128] = float("nan")  # nor in rows 64 to 128
    y = kernels.block_masked_linear_fwd(x, weight, inputs.bias, mask.bits, 32, 32)
    assert torch.equal(y, clean.y)
    dx = kernels.block_masked_linear_dx(grad_y, weight, mask.bits, 32, 32)
    assert torch.equal(dx, clean.dx)
    dw = kernels.block_masked_linear_dw(grad_y, x, mask.bits, 32, 32, N, K)
    assert torch.equal(dw, clean.dw)
    # Step 5 is in the list of the last tile of outputs alone.
    x[:, 160:192] = float("nan")
    y = kernels.block_masked_linear_fwd(x, weight, inputs.bias, mask.bits, 32, 32)
    assert torch.equal(y[:, :128], clean.y[:, :128])
    assert y[:, 128:].isnan().all()


def slow_steps(mask: BlockMask, tile: int, turned: bool) -> list[list[int]]:
    dense = mask.dense().t() if turned else mask.dense()
    outputs, reduction = dense.shape
    return [
        [
            step
            for step in range(-(-reduction // STEP))
            if dense[o : o + tile, step * STEP : (step + 1) * STEP].any()
        ]
        for o in range(0, outputs, tile)
    ]


@pytest.mark.skipif(not INTERPRETED, reason="calls are counted in the interpreter")
@pytest.mark.parametrize("way", ["loaded", "listed"], indirect=True)
def test_products_are_taken_of_steps_with_weights_alone(way, monkeypatch):
    calls = []
    dot = kernels.dot

    def counted(a, b, acc, PRECISION):
        calls.append(1)
        return dot(a, b, acc, PRECISION)

    monkeypatch.setattr(kernels, "dot", counted)
    case = MaskCase(40, 130, 330, (32, 32), 0.15)
    inputs, mask = make_case(case, torch.float32)
    x, weight, grad_y = inputs.x.detach(), inputs.weight.detach(), inputs.grad_y

    def of(call, *arguments):
        calls.clear()
        call(*arguments)
        return len(calls)

    def wanted(turned, tile):
        lists = slow_steps(mask, tile.b, turned)
        tiles = -(-case.M // tile.a)
        return sum(tiles * -(-len(steps) * STEP // tile.k) for steps in lists)

    tiles = kernels._tiles(x, way == "loaded")
    for turned, call, a in (
        (False, kernels.block_masked_linear_fwd, (x, weight, None)),
        (True, kernels.block_masked_linear_dx, (grad_y, weight)),
    ):
        tile = _tile.choose_tile(tiles, 64, weight.shape[turned])
        assert of(call, *a, mask.bits, 32, 32) == wanted(turned, tile) > 0
    (tile,) = kernels._FLOAT_DW_TILES
    groups = sum(-(-len(steps) * STEP // tile.b) for steps in slow_steps(mask, tile.a, False))
    products = of(kernels.block_masked_linear_dw, grad_y, x, mask.bits, 32, 32, *weight.shape)
    assert products == groups * -(-case.M // tile.k) > 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("tile", [32, 64, 128])
@pytest.mark.parametrize(
    "case",
    [
        MaskCase(1, 130, 330, (32, 32), 0.2),
        MaskCase(1, 200, 290, (3, 5), 0.01),
        MaskCase(1, 63, 9000, (200, 1), 0.02),
        MaskCase(1, 170, 300, (8, 400), 0.1),
        MaskCase(1, 64, 64, (1, 1), 0.0),
        MaskCase(1, 96, 40, (1, 1), 1.0),
    ],
    ids=lambda case: case.id,
)
def test_lists_hold_every_step_once_and_those_with_weights_first(case, tile, turned, device):
    mask = make_mask(case).to(device)
    made = _block_tiles.schedule(mask.bits, mask.block, mask.shape, tile, turned)
    want = slow_steps(mask, tile, turned)
    assert made.counts.tolist() == [len(steps) for steps in want]
    for steps, kept in zip(made.steps.tolist(), want):
        assert steps[: len(kept)] == kept
        assert sorted(steps) == list(range(len(steps)))
    share = _block_tiles.kept_share(mask.bits, mask.block, mask.shape, tile, turned)
    assert share == sum(map(len, want)) / made.steps.numel()


@pytest.mark.parametrize("device", DEVICES)
def test_a_list_is_made_once_for_each_state_of_a_mask(device, monkeypatch):
    made = []
    flags = _block_tiles._flags
    monkeypatch.setattr(_block_tiles, "_flags", lambda *a: made.append(1) or flags(*a))
    linear = BlockMaskedLinear.adopt(torch.nn.Linear(130, 63, device=device), (4, 1))
    linear.backend = "triton"
    first, other = (make_mask(SMALL, seed).to(device) for seed in (0, 1))
    x = torch.ones(5, 130, device=device, requires_grad=True)
    for mask in (first, other):
        linear.set_mask(mask)
        for _ in range(2):
            y = linear(x)
            y.sum().backward()
        plain = torch.nn.functional.linear(x, linear.weight * mask.dense(), linear.bias)
        torch.testing.assert_close(y, plain)
    assert len(made) == 2, "forward and backward of every step share what a mask is known for"
    known = len(_block_tiles._known)
    del linear, y, plain
    gc.collect()
    assert len(_block_tiles._known) == known - 1, "what is known of a mask goes with it"


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_bits_are_lists_of_their_own_for_other_blocks(device):
    bits = torch.tensor([[1], [1]], dtype=torch.uint8, device=device)
    masks = (((1, 32), (2, 256), 1), ((32, 64), (64, 512), 2))
    for block, shape, kept in masks * 2:
        made = _block_tiles.schedule(bits, block, shape, 64)
        assert made.steps.shape == (1, shape[1] // 32)
        assert made.counts.tolist() == [kept]


@pytest.mark.parametrize("device", DEVICES)
def test_a_tail_does_not_read_the_next_row(device):
    """Sizes that no tile divides, in buffers whose neighbours are NaN."""
    wide = torch.full((19, 140), float("nan"), device=device)
    x = wide[1:18, 3:133]
    x.fill_(1.0)
    weight = torch.full((63, 140), float("nan"), device=device)[:, 5:135]
    weight.fill_(1.0)
    full = torch.full((63, 17), 255, dtype=torch.uint8, device=device)  # bits behind the last one
    y = kernels.block_masked_linear_fwd(x, weight, None, full, 1, 1)
    assert torch.equal(y, torch.full((17, 63), 130.0, device=device))
    dw = kernels.block_masked_linear_dw(torch.ones(17, 63, device=device), x, full, 1, 1, 63, 130)
    assert torch.equal(dw, torch.full((63, 130), 17.0, device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_results_do_not_change_from_run_to_run(device):
    inputs, mask = moved(*make_case(MaskCase(300, 70, 64, (16, 16), 0.4), torch.float16), device)
    first, again = (run_module(kernels, inputs, mask) for _ in range(2))
    for name in ("y", "dx", "dw"):
        assert torch.equal(getattr(first, name), getattr(again, name)), name


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    inputs, mask = moved(*make_case(SMALL, torch.float32), device)
    x, weight, bias = inputs.x.detach(), inputs.weight.detach(), inputs.bias.detach()
    arguments = {
        "fwd": (x, weight, bias, mask.bits, 4, 1),
        "dx": (inputs.grad_y, weight, mask.bits, 4, 1),
        "dw": (inputs.grad_y, x, mask.bits, 4, 1, 63, 130),
    }
    for name, args in arguments.items():
        registered = getattr(torch.ops.slimkern, f"block_masked_linear_{name}").default
        checked = torch.library.opcheck(registered, (*args, "triton"))
        assert set(checked.values()) == {"SUCCESS"}, (name, checked)


def test_other_dtypes_are_refused():
    inputs, mask = make_case(MaskCase(3, 5, 6, (1, 1), 0.5), torch.float64)
    message = r"has dtype torch\.float64; backend 'triton' accepts torch\.float32, torch\.float16"
    bits, x, weight, grad_y = mask.bits, inputs.x.detach(), inputs.weight.detach(), inputs.grad_y
    with pytest.raises(TypeError, match=message):
        kernels.block_masked_linear_fwd(x, weight, None, bits, 1, 1)
    with pytest.raises(TypeError, match=message):
        kernels.block_masked_linear_dx(grad_y, weight, bits, 1, 1)
    with pytest.raises(TypeError, match=message):
        kernels.block_masked_linear_dw(grad_y, x, bits, 1, 1, 5, 6)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU or INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_graph_follows_a_mask_that_changes(dtype):
    """Captured with one mask, replayed with another: lists are part of the graph."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 512, device="cuda", dtype=dtype)
    linear = BlockMaskedLinear.adopt(linear, (32, 32))
    masks = [make_mask(MaskCase(1, 512, 256, (32, 32), d), 1).to("cuda") for d in (0.1, 0.9)]
    x = torch.randn(300, 256, device="cuda", dtype=dtype, requires_grad=True)

    def step():
        linear.weight.grad = x.grad = None
        y = linear(x)
        y.backward(torch.ones_like(y))
        return y, x.grad, linear.weight.grad

    linear.set_mask(masks[0])
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    linear.weight.grad = x.grad = None
    with torch.cuda.graph(graph):
        captured = step()
    for mask in masks:
        linear.set_mask(mask)
        with torch.no_grad():
            linear.weight.normal_(std=0.1)
        graph.replay()
        got = [tensor.clone() for tensor in captured]
        want = block_masked_linear(x, linear.weight, linear.bias, mask, backend="reference")
        torch.testing.assert_close(got[0], want, rtol=2e-2, atol=2e-2)
        assert (got[2][~mask.dense()] == 0).all()
        assert (got[2][mask.dense()] != 0).any()


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_gpu_takes_these_kernels_by_default_and_float64_the_equation():
    inputs, mask = moved(*make_case(MaskCase(70, 63, 130, (4, 1), 0.5), torch.float64), "cuda")
    assert_within_eager_error(run(op(mask, None), inputs), inputs, eager(mask))
    half = inputs.map(torch.Tensor.half)
    got, want = run(op(mask, None), half), run(op(mask, "triton"), half)
    assert torch.equal(got.y, want.y)
