"""The registered ops: schema, fakes, dispatch, and torch.compile forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from op_cases import Case, assert_within_eager_error, eager, make_inputs, run

from slimkern.ops import indexed_linear

BACKENDS = ["reference", "cpu"]
LAYOUTS = ["transposed", "sliced"]
KEPT = [(None, None), (17, None), (None, 63), (17, 63), (0, 0)]


def arguments(inputs):
    """Arguments of the four registered ops."""
    i = inputs
    N, K = i.weight.shape
    x, weight, bias = i.x.detach(), i.weight.detach(), i.bias.detach()
    return {
        "indexed_linear_fwd": (x, weight, bias, i.rows, i.cols),
        "indexed_linear_dx": (i.grad_y, weight, i.rows, i.cols),
        "indexed_linear_dw": (i.grad_y, x, i.rows, i.cols, N, K),
        "indexed_linear_db": (i.grad_y, i.rows, N),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kept", "layout"),
    [*((kept, "contiguous") for kept in KEPT), *((KEPT[3], layout) for layout in LAYOUTS)],
    ids=str,
)
def test_opcheck(kept, layout, backend):
    inputs = make_inputs(Case((5,), 63, 130, *kept, layout=layout), torch.float32)
    for name, args in arguments(inputs).items():
        checked = torch.library.opcheck(getattr(torch.ops.slimkern, name).default, (*args, backend))
        assert set(checked.values()) == {"SUCCESS"}, (name, checked)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_fakes_tell_the_truth(dtype, backend):
    inputs = make_inputs(Case((5,), 63, 130, R=17, C=63, layout="transposed"), dtype)
    for name, args in arguments(inputs).items():
        op = getattr(torch.ops.slimkern, name).default
        real = op(*args, backend)
        fake = op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args), backend)
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


class Pair(torch.nn.Module):
    """Two layers in a row whose middle is masked, as in a feed-forward block."""

    def __init__(self, keep, backend):
        super().__init__()
        self.up, self.down = torch.nn.Linear(17, 63), torch.nn.Linear(63, 17)
        self.register_buffer("keep", keep)
        self.backend = backend

    def forward(self, x):
        h = indexed_linear(x, self.up.weight, self.up.bias, self.keep, backend=self.backend)
        h = torch.nn.functional.gelu(h)
        return indexed_linear(
            h, self.down.weight, self.down.bias, None, self.keep, backend=self.backend
        )


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_fullgraph(backend, compiler):
    torch.manual_seed(0)
    model = Pair(torch.tensor([0, 3, 4, 9, 31, 62]), backend)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    x = torch.randn(2, 5, 17)
    grads = []
    for call in (model, compiled):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.square().sum().backward()
        grads.append([y.detach(), leaf.grad, *(p.grad.clone() for p in model.parameters())])
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_with_dynamic_sizes(backend):
    """Any number of tokens and of kept channels runs through one compiled graph."""
    frames = torch._dynamo.testing.CompileCounter()

    def step(x, w, b, rows, cols):
        return 2 * indexed_linear(x, w, b, rows, cols, backend=backend)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=frames)
    for tokens, R, C in ((5, 17, 64), (9, 20, 50), (33, 40, 100)):
        inputs = make_inputs(Case((tokens,), 63, 130, R=R, C=C), torch.float32)
        assert_within_eager_error(run(compiled, inputs), inputs, lambda *a: 2 * eager(*a))
    assert frames.frame_count == 1


def test_compile_under_autocast():
    model = Pair(torch.tensor([0, 3, 4, 9, 31, 62]), None)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, 17)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = compiled(x)
        want = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, want)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_fake_tensors_pass_through():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, weight = torch.empty(3, 7, 5), torch.empty(11, 9, requires_grad=True)
        rows, cols = torch.empty(4, dtype=torch.int64), torch.empty(5, dtype=torch.int64)
        y = indexed_linear(x, weight, None, rows, cols)
        assert y.shape == (3, 7, 4)
        y.sum().backward()
        assert weight.grad.shape == weight.shape


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_ops_keep_their_dtypes_under_autocast(backend):
    """Autocast is the callers' affair: inside an op nothing is cast again."""
    x, weight = torch.randn(5, 6), torch.randn(4, 6)
    want = torch.ops.slimkern.indexed_linear_fwd(x, weight, None, None, None, backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.ops.slimkern.indexed_linear_fwd(x, weight, None, None, None, backend)
    assert torch.equal(got, want)
