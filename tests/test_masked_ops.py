"""The ops of masked blocks and of the passes in them: fp64, gradients, registration, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from masked_cases import Maker, gradients, kept, whole_heads
from op_cases import ROUNDOFF
from torch import Tensor

from slimkern.ops._weights import FfnWeights, LinearWeights, NormWeights
from slimkern.ops.activation import activation_fwd, activation_grad
from slimkern.ops.activation import reference as activation_reference
from slimkern.ops.activation.api import ACTIVATIONS
from slimkern.ops.add_norm import add_norm_fwd, add_norm_grad
from slimkern.ops.masked_attention import Kept, masked_attention
from slimkern.ops.masked_attention import reference as attention_reference
from slimkern.ops.masked_ffn import masked_ffn
from slimkern.ops.masked_ffn import reference as ffn_reference
from slimkern.ops.seeded_dropout import draw_seed, dropout, seeded_dropout

SHAPES = [(0, 5), (1, 1), (17, 63), (300, 130)]
ENDINGS = ["norm", "residual", "plain"]
EPS = torch.finfo(torch.float64).eps


def matrix(shape, dtype, seed=0, strided=False):
    random = torch.Generator().manual_seed(seed)
    M, N = shape
    made = torch.randn(M, 2 * N if strided else N, generator=random, dtype=torch.float64)
    return (made[:, ::2] if strided else made).to(dtype)


def assert_as_near(
    got: Tensor, torchs: Tensor, exact: Tensor, roundings: float, terms: float = 0.0
) -> None:
    """The error is torch's own worst one, and ``roundings`` of float32, and of the storage.

    What is rounded is the result, or ``terms``, the largest of the terms that it is made of.
    """
    assert got.shape == exact.shape
    if not got.numel():
        return
    error, other = ((t.double() - exact).abs().max() for t in (got, torchs))
    unit = roundings * ROUNDOFF[torch.float32] + ROUNDOFF[got.dtype]
    assert error <= other + unit * max(float(exact.abs().max()), terms)


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name, shape, dtype, strided):
    x, grad = matrix(shape, dtype, 0, strided) * 3, matrix(shape, dtype, 1, strided)
    exact = activation_reference.activation_grad(grad.double(), x.double(), name)
    torchs = activation_reference.activation_grad(grad, x, name)
    got = activation_grad(grad, x, name, "cpu")
    assert_as_near(got[0], torchs[0], exact[0], 8)
    for value in (got[1], activation_fwd(x, name, "cpu")):
        assert_as_near(value, torchs[1], exact[1], 2)
    assert got[2].dtype == torch.float32
    # Sums of the products before they are rounded, each with the error of its factor.
    slack = (shape[0] ** 0.5 + 8) * ROUNDOFF[torch.float32] * exact[0].abs().sum(0)
    assert ((got[2].double() - exact[2]).abs() <= slack + 1e-12).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_everywhere(name):
    """In each of 128 ranges the worst error is torch's and a few roundings; ends and NaN."""
    x = torch.linspace(-20, 20, 40_001)
    one = torch.ones_like(x)[:, None]
    exact = activation_reference.activation_grad(one.double(), x.double()[:, None], name)[0][:, 0]
    torchs = activation_reference.activation_grad(one, x[:, None], name)[0][:, 0]
    got = activation_grad(one, x[:, None], name, "cpu")[0][:, 0]
    for chunk in torch.arange(len(x)).chunk(128):
        error, other = ((t[chunk].double() - exact[chunk]).abs().max() for t in (got, torchs))
        assert error <= other + 4 * 2**-24 * exact[chunk].abs().max().clamp(min=1), x[chunk][0]
    odd = torch.tensor([[float("nan"), 1e30, -1e30, 0.0]])
    dx, _, _ = activation_grad(torch.ones(1, 4), odd, name, "cpu")
    if name != "relu":
        assert dx[0, 0].isnan() or name == "none"
    if "squared" not in name and name != "gelu_tanh":
        assert dx[0, 1] == 1
        assert dx[0, 2] == (1 if name == "none" else 0)


@pytest.mark.parametrize("types", ["fp32", "mixed", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_norm(shape, types):
    low, high = torch.bfloat16, torch.float32
    x_type, dtype = {"fp32": (high, high), "mixed": (low, high), "bf16": (low, low)}[types]
    x, residual = matrix(shape, x_type, 0, True), matrix(shape, dtype, 1) + 3
    gamma, beta = torch.randn(shape[1]), torch.randn(shape[1])
    grad = matrix(shape, dtype, 2, True)

    def run(cast):
        leaf = (cast(x) + cast(residual)).detach().requires_grad_()
        g, b = (cast(t.clone()).requires_grad_() for t in (gamma, beta))
        y = F.layer_norm(leaf, shape[1:], g, b, 1e-5)
        return [y.detach(), *torch.autograd.grad(y, (leaf, g, b), cast(grad))]

    y, s, stats = add_norm_fwd(x, residual, gamma, beta, 1e-5, None, 0.0, "cpu")
    ds, narrow, sums = add_norm_grad(grad, s, stats, gamma, types == "mixed", None, 0.0, "cpu")
    exact, torchs = run(Tensor.double), run(Tensor.float)
    n = sum(shape) ** 0.5 + 8
    # A row of one number has no gradient: all that is left is the rounding of grad * gamma.
    factor = stats[:, 1].max() * gamma.abs().max() if shape[0] else 0.0
    term = float(grad.abs().max() * factor) if shape[0] else 0.0
    for a, b, c, t in zip((y, ds, *sums[:2]), torchs, exact, (0, term, 0, 0), strict=True):
        assert_as_near(a, b, c, n, t)
    assert y.dtype == ds.dtype == dtype
    if types == "mixed":
        assert torch.equal(narrow, ds.to(low))
    if shape[0]:
        slack = n * ROUNDOFF[high] * (exact[1].abs().sum(0) + shape[0] ** 0.5 * term)
        assert ((sums[2].double() - exact[1].sum(0)).abs() <= slack).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_what_dropout_drops(p, dtype, backend):
    x, n = torch.ones(1000, 200, dtype=dtype), 200_000
    y = seeded_dropout(x, torch.tensor([7]), p, backend)
    assert torch.equal(y, seeded_dropout(x, torch.tensor([7]), p, backend))
    assert torch.equal(y, seeded_dropout(x, torch.tensor([7]), p, "reference"))
    gone = y == 0
    assert torch.equal(y[~gone], torch.full_like(y[~gone], 1 / (1 - p)))
    sigma = (p * (1 - p)) ** 0.5
    assert abs(gone.double().mean() - p) < 5 * sigma / n**0.5
    # Neighbours, rows and columns, other seeds: independent.
    z = (gone.double() - p) / sigma
    other = (seeded_dropout(x, torch.tensor([8]), p, backend) == 0).double()
    far = (seeded_dropout(x, torch.tensor([7 + 2**40]), p, backend) == 0).double()
    pairs = [(z[:, 1:], z[:, :-1]), (z[1:], z[:-1])]
    pairs += [(z, (o - p) / sigma) for o in (other, far)]
    for a, b in pairs:
        assert abs((a * b).mean()) < 5 / a.numel() ** 0.5
    assert z.mean(0).abs().max() < 6 / 1000**0.5
    assert z.mean(1).abs().max() < 6 / 200**0.5


def test_dropout_follows_torchs_generator_and_its_gradient_the_same_choice():
    x = torch.randn(50, 40, requires_grad=True)
    torch.manual_seed(3)
    first = dropout(x, 0.4)
    torch.manual_seed(3)
    again = dropout(x, 0.4)
    assert torch.equal(first, again)
    assert not torch.equal(dropout(x, 0.4), first)
    (dx,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(dx != 0, first != 0)
    assert dropout(x, 0.0) is x
    assert not dropout(x, 1.0).any()
    assert dropout(torch.full((100,), float("inf")), 0.5).isnan().sum() == 0


@pytest.mark.parametrize("count", [None, 20, 1, 0])
@pytest.mark.parametrize("ending", ENDINGS)
def test_masked_ffn_is_its_equation(ending, count):
    make = Maker()
    w, x = make.ffn(17, 63, "gelu", ending), make.tensor(2, 5, 17, strided=True)
    keep = kept(63, count)
    got = gradients(masked_ffn(x, w, keep), make.leaves)
    want = gradients(ffn_reference.masked_ffn(x, w, keep), make.leaves)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e3 * EPS * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("masked", [None, "bool", "float"])
@pytest.mark.parametrize("count", [None, 3, 1])
@pytest.mark.parametrize("ending", ENDINGS)
def test_masked_attention_is_its_equation(ending, count, masked):
    make = Maker()
    w, x = make.attention(24, 6, 4, ending), make.tensor(2, 7, 24, strided=True)
    rows, mask = whole_heads(kept(6, count), 4), None
    if masked is not None:
        mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
        mask[1, ..., 4:] = False
        mask = mask if masked == "bool" else (~mask).double() * -1e4
    got = gradients(masked_attention(x, w, Kept(rows, rows, rows, rows), mask), make.leaves)
    want = gradients(attention_reference.masked_attention(x, w, rows, mask), make.leaves)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e3 * EPS * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("ending", ENDINGS)
def test_gradcheck(ending):
    make = Maker()
    w, x = make.ffn(3, 7, "gelu_tanh", ending), make.tensor(4, 3)
    leaves = make.leaves

    def feed(*given):
        post = NormWeights(*given[4:6], 1e-5) if ending == "norm" else None
        made = FfnWeights(
            LinearWeights(*given[:2]), LinearWeights(*given[2:4]), activation="gelu_tanh",
            post=post, residual=w.residual,
        )  # fmt: skip
        return masked_ffn(given[-1], made, kept(7, 4))

    # The order in which the maker made them: the norm comes first.
    order = leaves[2:6] + leaves[:2] + leaves[6:] if ending == "norm" else leaves
    assert order[-1] is x
    assert torch.autograd.gradcheck(feed, order)


@pytest.mark.parametrize("kind", ["ffn", "attention"])
def test_autocast_and_its_errors(kind):
    """Under autocast: parameters' gradients float32, as near to fp64 as eager autocast, doubled."""
    make = Maker(torch.float32)
    keep = kept(6, 4)
    if kind == "ffn":
        w, x = make.ffn(48, 96, "gelu", "norm"), make.tensor(3, 9, 48, scale=1.0)
        index = kept(96, 40)
        call, ref = (
            (lambda: masked_ffn(x, w, index)),
            (lambda: ffn_reference.masked_ffn(x, w, index)),
        )
    else:
        w, x = make.attention(48, 6, 8, "norm"), make.tensor(3, 9, 48, scale=1.0)
        rows = whole_heads(keep, 8)
        call = lambda: masked_attention(x, w, Kept(rows, rows, rows, rows))  # noqa: E731
        ref = lambda: attention_reference.masked_attention(x, w, rows)  # noqa: E731
    exact = gradients(ref(), make.leaves)
    with torch.autocast("cpu", torch.bfloat16):
        y, eager = call(), ref()
    assert y.dtype == torch.float32
    got, eager = gradients(y, make.leaves), gradients(eager, make.leaves)
    for i, (a, b, c) in enumerate(zip(got, eager, exact, strict=True)):
        assert a.dtype == torch.float32
        scale = c.norm()
        if scale < 1e-3 * exact[1].norm():
            continue  # a key's bias: nothing but rounding
        assert (a - c).norm() <= 2 * (b - c).norm() + 2**-8 * scale, i


def test_only_the_pre_activation_is_saved():
    make = Maker(torch.float32)
    w, x = make.ffn(17, 63, "gelu", "norm"), make.tensor(5, 17)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        masked_ffn(x, w, kept(63, 20))
    wide = [t for t in saved if t.shape == (5, 20)]
    assert len(wide) == 1
    assert not [t for t in saved if t.shape == (5, 63)]


def test_frozen_parts_get_no_gradient():
    make = Maker(torch.float32)
    w, x = make.ffn(17, 63, "gelu", "norm"), make.tensor(5, 17)
    for leaf in make.leaves[:-1]:
        leaf.requires_grad_(False)
    masked_ffn(x, w, kept(63, 20)).sum().backward()
    assert x.grad is not None
    assert all(leaf.grad is None for leaf in make.leaves[:-1])


def test_the_second_derivative_is_refused():
    make = Maker()
    w, x = make.ffn(5, 7, "gelu", "norm"), make.tensor(4, 5)
    with pytest.raises(RuntimeError, match="differentiable once; create_graph is True"):
        torch.autograd.grad(masked_ffn(x, w).square().sum(), x, create_graph=True)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend):
    x, grad = matrix((17, 63), torch.float32), matrix((17, 63), torch.float32, 1, True)
    gamma = torch.ones(63)
    s, stats = x + grad, torch.ones(17, 3)
    seed = draw_seed()
    ops = torch.ops.slimkern
    for op, arguments in (
        (ops.activation_fwd, (x, "gelu")),
        (ops.activation_grad, (grad, x, "silu")),
        (ops.add_norm_fwd, (x, grad, gamma, gamma, 1e-5, None, 0.0)),
        (ops.add_norm_fwd, (x, grad, gamma, gamma, 1e-5, seed, 0.5)),
        (ops.add_norm_grad, (grad, s, stats, gamma, False, None, 0.0)),
        (ops.add_norm_grad, (grad, s, stats, gamma, True, seed, 0.5)),
        (ops.add_norm_grad, (grad, s, stats, gamma, True, None, 0.0)),
        (ops.add_norm_grad, (grad, s, stats, gamma, False, seed, 0.5)),
        (ops.seeded_dropout, (grad, seed, 0.5)),
    ):
        found = torch.library.opcheck(op.default, (*arguments, backend))
        assert set(found.values()) == {"SUCCESS"}, (op, found)


def test_refusals_name_the_argument():
    make = Maker(torch.float32)
    w, x = make.ffn(17, 63, "gelu", "norm"), make.tensor(5, 17)
    bad = [
        ({"keep": torch.arange(64)}, ValueError, r"keep has shape \(64,\); accepted: .* 63"),
        ({"keep": torch.arange(3).int()}, TypeError, r"keep has dtype torch\.int32"),
        ({"dropout": 1.5}, ValueError, r"dropout is 1\.5; accepted: 0 to 1"),
        ({"backend": "gpu"}, ValueError, "backend is 'gpu'"),
    ]
    for options, error, message in bad:
        with pytest.raises(error, match=message):
            masked_ffn(x, w, **options)
    with pytest.raises(ValueError, match=r"fc1\.weight has shape \(63, 17\); accepted: \[63, 16\]"):
        masked_ffn(x[:, :16], w)
    with pytest.raises(TypeError, match=r"fc1\.weight has dtype torch\.float32; accepted: .*64"):
        masked_ffn(x.double(), w)
    with pytest.raises(ValueError, match="activation is 'tanh'; accepted: none, relu"):
        masked_ffn(x, make.ffn(17, 63, "tanh", "norm"))
    a = make.attention(24, 6, 4, "norm")
    x = make.tensor(2, 7, 24)
    with pytest.raises(ValueError, match=r"kept has .* accepted: equal numbers"):
        masked_attention(x, a, Kept(query=torch.arange(4)))
    with pytest.raises(ValueError, match=r"x has shape \(7, 24\); accepted: \[B, T, hidden\]"):
        masked_attention(x[0], a)
    with pytest.raises(TypeError, match=r"mask has dtype torch\.int64; accepted: bool or floating"):
        masked_attention(x, a, mask=torch.ones(2, 1, 1, 7).long())
