"""The Triton kernels that pass over rows, against fp64; in the interpreter, and on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_cases import ROUNDOFF
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed on this platform")

import triton
import triton.language as tl
from triton_cases import DEVICES, DTYPE_IDS, DTYPES
from triton_cases import skip_interpreted_bf16 as skip_truncation

from slimkern.ops import _rows
from slimkern.ops.activation import reference as activation_reference
from slimkern.ops.activation import triton as activation
from slimkern.ops.activation.api import ACTIVATIONS
from slimkern.ops.add_norm import reference as norm_reference
from slimkern.ops.add_norm import triton as norm
from slimkern.ops.seeded_dropout import draw_seed, dropout
from slimkern.ops.seeded_dropout import reference as dropout_reference
from slimkern.ops.seeded_dropout import triton as dropout_kernel

SHAPES = [(0, 5), (3, 0), (1, 1), (17, 63), (35, 130)]
U32 = ROUNDOFF[torch.float32]


def matrix(shape, dtype, device, seed=0, strided=False):
    random = torch.Generator().manual_seed(seed)
    M, N = shape
    made = torch.randn(M, 2 * N if strided else N, generator=random, dtype=torch.float64)
    made = made.to(device, dtype)
    return made[:, ::2] if strided else made[:, :N]


def assert_as_near(got: Tensor, torchs: Tensor, exact: Tensor, roundings: float, terms=0.0):
    """The error is eager's own worst one and ``roundings`` of float32, and of the storage.

    What is rounded is the result, or ``terms``, the largest of the terms that it is made of.
    """
    assert got.shape == exact.shape
    if not got.numel():
        return
    assert not got.isnan().any()
    error, other = ((t.double() - exact).abs().max() for t in (got, torchs))
    unit = roundings * U32 + ROUNDOFF[got.dtype]
    assert error <= other + unit * max(float(exact.abs().max()), terms)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name, shape, dtype, device, poisoned):
    skip_truncation(dtype, device)
    x, grad = matrix(shape, dtype, device, 0, True) * 3, matrix(shape, dtype, device, 1)
    exact = activation_reference.activation_grad(grad.double(), x.double(), name)
    torchs = activation_reference.activation_grad(grad, x, name)
    got = activation.activation_grad(grad, x, name)
    assert_as_near(got[0], torchs[0], exact[0], 8)
    for value in (got[1], activation.activation_fwd(x, name)):
        assert value.dtype == dtype
        assert_as_near(value, torchs[1], exact[1], 4)
    assert got[2].dtype == torch.float32
    # Sums of the products before they are rounded, each with the error of its factor.
    slack = (shape[0] ** 0.5 + 8) * U32 * exact[0].abs().sum(0)
    assert ((got[2].double() - exact[2]).abs() <= slack + 1e-12).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_everywhere(name, device):
    """In each of 128 ranges the worst error is torch's and a few roundings."""
    x = torch.linspace(-20, 20, 2001, device=device).view(23, 87)
    one = torch.ones_like(x)
    exact = activation_reference.activation_grad(one.double(), x.double(), name)
    torchs = activation_reference.activation_grad(one, x, name)
    got = activation.activation_grad(one, x, name)
    for which in (0, 1):
        for chunk in torch.arange(x.numel()).chunk(128):
            want, *found = (t[which].flatten()[chunk].double() for t in (exact, got, torchs))
            error, other = ((t - want).abs().max() for t in found)
            assert error <= other + 4 * U32 * want.abs().max().clamp(min=1), x.flatten()[chunk][0]
    odd = torch.tensor([[float("nan"), 1e10, -1e10, 0.0]], device=device)
    value = activation.activation_fwd(odd, name)[0]
    assert value[0].isnan()
    assert value[3] == 0
    assert value[2] == (0.0 if name != "none" else -1e10)


@pytest.mark.parametrize("device", DEVICES)
def test_sums_in_slices(device, poisoned, monkeypatch):
    """Slices of several steps, the last one short: exact numbers, so that none may be missing."""
    monkeypatch.setattr(_rows, "_PROGRAMS", 6)
    x = torch.ones(403, 3, device=device)
    _, _, sums = activation.activation_grad(x, x, "relu")
    assert torch.equal(sums, torch.full((3,), 403.0, device=device))
    s, stats = torch.zeros(403, 5, device=device), torch.zeros(403, 3, device=device)
    sums = norm.add_norm_grad(x[:, :1].expand(-1, 5), s, stats, s[0], False, None, 0.0)[2]
    assert torch.equal(sums[1], torch.full((5,), 403.0, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("types", ["fp32", "mixed", "fp16", "bf16"])
@pytest.mark.parametrize("shape", [*SHAPES, (9, 768)], ids=str)
def test_add_norm(shape, types, p, device, poisoned):
    half = {"fp32": torch.float32, "fp16": torch.float16}.get(types, torch.bfloat16)
    dtype = torch.float32 if types == "mixed" else half
    if types == "bf16":
        skip_truncation(half, device)
    x, residual = matrix(shape, half, device, 0, True), matrix(shape, dtype, device, 1) + 3
    gamma, beta = (matrix((1, shape[1]), dtype, device, i)[0] for i in (3, 4))
    grad = matrix(shape, dtype, device, 2)
    seed = torch.tensor([7], device=device) if p else None

    def run(cast):
        kept = cast(x)
        if seed is not None:
            kept = dropout_reference.seeded_dropout(kept, seed, p)
        leaf = (kept + cast(residual)).detach().requires_grad_()
        g, b = (cast(t.clone()).requires_grad_() for t in (gamma, beta))
        y = F.layer_norm(leaf, shape[1:], g, b, 1e-5)
        ds, dg, db = torch.autograd.grad(y, (leaf, g, b), cast(grad))
        dx = ds if seed is None else dropout_reference.seeded_dropout(ds, seed, p)
        return [y.detach(), ds, dx, dg, db]

    narrow = types == "mixed" and device != "cpu"
    y, s, stats = norm.add_norm_fwd(x, residual, gamma, beta, 1e-5, seed, p)
    ds, dx, sums = norm.add_norm_grad(grad, s, stats, gamma, narrow, seed, p)
    if shape[1] == 0:
        assert y.shape == ds.shape == shape
        return
    exact, torchs = run(Tensor.double), run(Tensor.float)
    n = sum(shape) ** 0.5 + 8
    # A row of one number has no gradient: all that is left is the rounding of grad * gamma.
    factor = stats[:, 1].max() * gamma.abs().max() if shape[0] else 0.0
    term = float(grad.abs().max() * factor) / (1 - p if p < 1 else 1) if shape[0] else 0.0
    if seed is None and not narrow:
        assert dx.numel() == 0
        dx = ds
    assert y.dtype == ds.dtype == dtype
    assert dx.dtype == (torch.bfloat16 if narrow else dtype)
    for a, b, c, t in zip((y, ds, dx, *sums[:2]), torchs, exact, (0, term, term, 0, 0)):
        assert_as_near(a, b, c, n, t)
    slack = n * U32 * (exact[2].abs().sum(0) + shape[0] ** 0.5 * term)
    assert ((sums[2].double() - exact[2].sum(0)).abs() <= slack).all()
    want = norm_reference.add_norm_fwd(x.double(), residual.double(), gamma, beta, 1e-5, seed, p)[1]
    assert_as_near(s, want.float(), want, 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.0])
def test_what_is_dropped_is_what_the_reference_drops(p, dtype, device, poisoned):
    skip_truncation(dtype, device)
    x = matrix((37, 113), dtype, device).view(37, 1, 113)
    for seed in (7, -5, 7 + 2**40, 2**63 - 1, int(draw_seed())):
        seed = torch.tensor([seed], device=device)
        got = dropout_kernel.seeded_dropout(x, seed, p)
        assert torch.equal(got, dropout_reference.seeded_dropout(x, seed, p))
        turned = dropout_kernel.seeded_dropout(x.transpose(0, 2), seed, p)
        assert torch.equal(turned, dropout_reference.seeded_dropout(x.transpose(0, 2), seed, p))
    assert dropout_kernel.seeded_dropout(x[:0], seed, p).shape == (0, 1, 113)


@triton.jit
def _choices_kernel(out_ptr, first, seed, threshold, BLOCK: tl.constexpr):
    number = first + tl.arange(0, BLOCK).to(tl.int64)
    tl.store(out_ptr + tl.arange(0, BLOCK), _rows.kept_by_seed(number, seed, threshold))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("first", [0, 2**31 - 40, 2**32 - 40, 5 * 2**32 + 7])
def test_choices_beyond_32_bits(first, device):
    got = torch.empty(128, dtype=torch.bool, device=device)
    seed = -(2**40) + 11
    _choices_kernel[(1,)](got, first, seed, 2**31, BLOCK=128)
    number, word = first + torch.arange(128, device=device), 0xFFFFFFFF
    page = ((number >> 32) * 0x9E3779B9 + (seed >> 32)) & word
    mixed = dropout_reference._mixed
    assert torch.equal(got, mixed(mixed((number + seed) & word) ^ page) >= 2**31)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_draws_anew_at_each_replay():
    x = torch.ones(64, 64, device="cuda", requires_grad=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        dropout(x, 0.5).sum().backward()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    x.grad = None
    with torch.cuda.graph(graph):
        y = dropout(x, 0.5)
        y.sum().backward()
    seen = []
    for _ in range(2):
        graph.replay()
        assert torch.equal(x.grad != 0, y != 0)
        seen.append(y.detach().clone())
    assert not torch.equal(*seen)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    x, grad = (matrix((9, 17), torch.float32, device, i, bool(i)) for i in range(2))
    gamma, seed = torch.ones(17, device=device), draw_seed(torch.device(device))
    s, stats = x + grad, torch.ones(9, 3, device=device)
    ops = torch.ops.slimkern
    for op, arguments in (
        (ops.activation_fwd, (x, "gelu")),
        (ops.activation_grad, (grad, x, "silu")),
        (ops.add_norm_fwd, (x, grad, gamma, gamma, 1e-5, None, 0.0)),
        (ops.add_norm_fwd, (x, grad, gamma, gamma, 1e-5, seed, 0.5)),
        (ops.add_norm_grad, (grad, s, stats, gamma, True, None, 0.0)),
        (ops.add_norm_grad, (grad, s, stats, gamma, False, seed, 0.5)),
        (ops.seeded_dropout, (grad, seed, 0.5)),
    ):
        found = torch.library.opcheck(op.default, (*arguments, "triton"))
        assert set(found.values()) == {"SUCCESS"}, (op, found)


def test_other_dtypes_are_refused():
    x = torch.zeros(2, 3, dtype=torch.float64)
    message = r"has dtype torch\.float64; backend 'triton' accepts torch\.float32, torch\.float16"
    for call in (
        lambda: activation.activation_fwd(x, "relu"),
        lambda: activation.activation_grad(x, x, "relu"),
        lambda: norm.add_norm_fwd(x, x, x[0], x[0], 1e-5, None, 0.0),
        lambda: dropout_kernel.seeded_dropout(x, torch.tensor([1]), 0.5),
    ):
        with pytest.raises(TypeError, match=message):
            call()
