"""block_masked_linear against fp64, against zeros in the weight, its gradients and refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from block_mask_cases import (
    CASES,
    IDS,
    MaskCase,
    eager,
    make_case,
    make_mask,
    op,
    run_module,
    zeroed,
)
from op_cases import assert_within_eager_error, run
from op_cases import eager as linear

from slimkern import cpu as machine
from slimkern.ops import BlockMask, block_masked_linear
from slimkern.ops.block_masked_linear import cpu, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
DTYPE_IDS = ["fp32", "bf16", "fp64"]
MODULES = {"reference": reference, "cpu": cpu}
SMALL = MaskCase(17, 63, 130, (4, 1), 0.5)


@pytest.mark.parametrize("backend", MODULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_forward_and_gradients(case, dtype, backend):
    inputs, mask = make_case(case, dtype)
    result = run(op(mask, backend), inputs)
    assert_within_eager_error(result, inputs, eager(mask))
    assert (result.dw[~mask.dense()] == 0).all()


@pytest.fixture
def restore():
    before, threads = machine.isa(), torch.get_num_threads()
    yield
    machine.set_isa(before)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=DTYPE_IDS[:2])
@pytest.mark.parametrize("isa", machine.available_isas())
@pytest.mark.parametrize("case", CASES[::3], ids=IDS[::3])
def test_every_isa_writes_every_output(case, isa, dtype, restore, monkeypatch):
    """Uninitialised memory is NaN: what a kernel forgets to write, or reads too early, shows."""
    empty = torch.empty
    machine.set_isa(isa)
    inputs, mask = make_case(case, dtype)
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    result = run_module(cpu, inputs, mask)
    monkeypatch.undo()
    assert_within_eager_error(result, inputs, eager(mask))


def test_threads_do_not_change_the_result(restore):
    inputs, mask = make_case(MaskCase(300, 700, 290, (4, 1), 0.2), torch.float32)
    results = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        results.append(run_module(cpu, inputs, mask))
    for other in results[1:]:
        for name in ("y", "dx", "dw"):
            assert torch.equal(getattr(results[0], name), getattr(other, name)), name


@pytest.mark.parametrize("backend", MODULES)
@pytest.mark.parametrize("case", CASES[:4], ids=IDS[:4])
def test_masked_is_dense_with_zeros(case, backend):
    inputs, mask = make_case(case, torch.float32)
    assert_within_eager_error(
        run(op(mask, backend, dense=True), zeroed(inputs, mask)), zeroed(inputs, mask), linear
    )


@pytest.mark.parametrize("backend", MODULES)
def test_dense_gradient(backend):
    inputs, mask = make_case(SMALL, torch.float64)
    dense = run(op(mask, backend, dense=True), inputs)
    torch.testing.assert_close(dense.dw, inputs.grad_y.t() @ inputs.x.detach())
    kept = run(op(mask, backend), inputs)
    for name in ("y", "dx", "db"):
        assert torch.equal(getattr(dense, name), getattr(kept, name)), name


@pytest.mark.parametrize("backend", MODULES)
def test_what_is_masked_is_not_read(backend):
    inputs, mask = make_case(SMALL, torch.float32)
    want = run(op(mask, backend), zeroed(inputs, mask))
    hidden = inputs.map(lambda t: t)
    hidden.weight.data[~mask.dense()] = float("nan")
    got = run(op(mask, backend), hidden)
    for name in ("y", "dx", "dw", "db"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


@pytest.mark.parametrize("backend", MODULES)
def test_leading_dimensions(backend):
    inputs, mask = make_case(MaskCase(30, 63, 130, (4, 1), 0.5), torch.float32)
    call = op(mask, backend)
    flat = call(inputs.x, inputs.weight, inputs.bias)
    folded = call(inputs.x.view(2, 3, 5, 130), inputs.weight, inputs.bias)
    assert torch.equal(folded.view(30, 63), flat)
    one = call(inputs.x[0], inputs.weight, inputs.bias)
    assert one.shape == (63,)


@pytest.mark.parametrize("backend", MODULES)
def test_autocast_is_that_of_a_linear(backend):
    inputs, mask = make_case(SMALL, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = op(mask, backend)(inputs.x, inputs.weight, inputs.bias)
        assert F.linear(inputs.x, inputs.weight).dtype == y.dtype == torch.bfloat16
    y.backward(inputs.grad_y.bfloat16())
    want = run(op(mask, backend), inputs.map(lambda t: t.bfloat16()))
    assert torch.equal(y.detach(), want.y)
    for name, leaf in (("dx", inputs.x), ("dw", inputs.weight), ("db", inputs.bias)):
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, getattr(want, name).float()), name


@pytest.mark.parametrize("needed", ["x", "weight", "bias"])
@pytest.mark.parametrize("backend", MODULES)
def test_only_the_gradients_asked_for(backend, needed):
    inputs, mask = make_case(SMALL, torch.float32)
    for name in ("x", "weight", "bias"):
        getattr(inputs, name).requires_grad_(name == needed)
    y = op(mask, backend)(inputs.x, inputs.weight, inputs.bias)
    saved = [t for t in y.grad_fn.saved_tensors if t is not None and t.is_floating_point()]
    assert len(saved) == {"x": 1, "weight": 1, "bias": 0}[needed]
    y.backward(inputs.grad_y)
    for name in ("x", "weight", "bias"):
        assert (getattr(inputs, name).grad is not None) == (name == needed)


def test_second_derivative_is_refused():
    inputs, mask = make_case(SMALL, torch.float64)
    y = op(mask, None)(inputs.x, inputs.weight, inputs.bias)
    with pytest.raises(RuntimeError, match="differentiable once; create_graph is True"):
        torch.autograd.grad(y.square().sum(), inputs.x, create_graph=True)


@pytest.mark.parametrize("backend", MODULES)
@pytest.mark.parametrize("dense", [False, True])
def test_gradcheck(backend, dense):
    case = MaskCase(3, 5, 6, (2, 1), 0.5)
    inputs, mask = make_case(case, torch.float64)
    # The dense gradient is that of a linear whose masked weights happen to be zero.
    inputs.weight.requires_grad_(not dense)
    leaves = [leaf for leaf in (inputs.x, inputs.bias, inputs.weight) if leaf.requires_grad]

    def call(x, bias, weight=inputs.weight):
        return block_masked_linear(x, weight, bias, mask, dense_gradient=dense, backend=backend)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("backend", MODULES)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_opcheck(layout, backend):
    case = MaskCase(5, 63, 130, (4, 1), 0.5, layout=layout)
    inputs, mask = make_case(case, torch.float32)
    x, weight, bias, dy = inputs.x.detach(), inputs.weight.detach(), inputs.bias, inputs.grad_y
    arguments = {
        "fwd": (x, weight, bias.detach(), mask.bits, 4, 1),
        "dx": (dy, weight, mask.bits, 4, 1),
        "dw": (dy, x, mask.bits, 4, 1, 63, 130),
    }
    for name, args in arguments.items():
        registered = getattr(torch.ops.slimkern, f"block_masked_linear_{name}").default
        checked = torch.library.opcheck(registered, (*args, backend))
        assert set(checked.values()) == {"SUCCESS"}, (name, checked)


@pytest.mark.parametrize("backend", MODULES)
def test_compile_fullgraph(backend):
    torch._dynamo.reset()
    inputs, mask = make_case(SMALL, torch.float32)
    compiled = torch.compile(op(mask, backend), fullgraph=True, backend="aot_eager")
    got, want = run(compiled, inputs), run(op(mask, backend), inputs)
    for name in ("y", "dx", "dw", "db"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name))


def test_meta_tensors_give_shapes():
    mask = make_mask(SMALL).to("meta")
    weight = torch.empty(63, 130, device="meta", requires_grad=True)
    y = block_masked_linear(torch.empty(2, 4, 130, device="meta"), weight, None, mask)
    assert (y.shape, y.device.type) == ((2, 4, 63), "meta")
    y.sum().backward()
    assert weight.grad.shape == weight.shape


X, W, B = torch.zeros(4, 6), torch.zeros(5, 6), torch.zeros(5)
MASK = BlockMask.from_blocks(torch.ones(5, 6).bool(), (1, 1), (5, 6))
OTHER = BlockMask.from_blocks(torch.ones(6, 5).bool(), (1, 1), (6, 5))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(4, 7), W, B, MASK), ValueError, r"x has shape \(4, 7\); accepted: .* of 6"),
        ((X, W, B.double(), MASK), TypeError, r"bias has dtype torch\.float64; accepted: .*32"),
        ((X, W, B, MASK.dense()), TypeError, r"mask is Tensor; accepted: slimkern.ops.BlockMask"),
        ((X, W, B, OTHER), ValueError, r"mask is for a weight of shape \(6, 5\); accepted: \(5, 6"),
        ((X, W, B, MASK.to("meta")), ValueError, r"mask is on meta; accepted: cpu"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        block_masked_linear(*arguments)
