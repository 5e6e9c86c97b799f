"""Masked blocks and what they are made of on Triton: in the interpreter, and on a GPU."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from masked_cases import Maker, kept, whole_heads
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from triton_cases import DEVICES, DTYPE_IDS, DTYPES
from triton_cases import skip_interpreted_bf16 as skip_truncation

from slimkern.ops.kept_linear import reference
from slimkern.ops.kept_linear import triton as kernels
from slimkern.ops.masked_attention import Kept, masked_attention
from slimkern.ops.masked_attention import reference as attention_reference
from slimkern.ops.masked_ffn import masked_ffn
from slimkern.ops.masked_ffn import reference as ffn_reference

EPS = torch.finfo(torch.float32).eps


def normal(*shape, dtype, device, seed=0, scale=1.0):
    random = torch.Generator().manual_seed(seed)
    made = torch.randn(*shape, generator=random, dtype=torch.float64) * scale
    return made.to(device, dtype)


def indices(size, count, device, seed=0):
    index = kept(size, count, seed)
    return None if index is None else index.to(device)


# ---- the copies, and gradients back to full size -----------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("count", [None, 41, 0])
@pytest.mark.parametrize("columns", [None, 17, 0])
def test_copies_are_the_kept_part_and_zeros(columns, count, parts, device, poisoned):
    weights = [normal(63, 130, dtype=torch.float32, device=device, seed=i) for i in range(parts)]
    weights[-1] = weights[-1].t().contiguous().t()
    rows = [indices(63, count, device, i) for i in range(parts)]
    cols = indices(130, columns, device)
    biases = [normal(63, dtype=torch.float32, device=device, seed=9)] + [None] * (parts - 1)
    for given in (biases, [None] * parts):
        for dtype in (torch.float32, torch.float16):
            for multiple in (1, 64):
                arguments = (weights, given, rows, cols, dtype, multiple)
                got, want = kernels.kept_weights(*arguments), reference.kept_weights(*arguments)
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_an_unselected_nan_does_not_leak(device):
    weight = torch.full((70, 90), float("nan"), device=device)
    rows, cols = torch.tensor([1, 4, 69], device=device), torch.tensor([0, 3, 77], device=device)
    weight[rows[:, None], cols] = 1.0
    bias = torch.full((70,), float("nan"), device=device).index_fill_(0, rows, 2.0)
    copy, shift = kernels.kept_weights([weight], [bias], [rows], cols, torch.float32, 64)
    assert copy.sum() == 9
    assert shift.sum() == 6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("left", [False, True], ids=["here", "left to torch"])
def test_products_on_copies(left, dtype, device, poisoned, monkeypatch):
    """Integers: every sum is exact, so that a result is right or wrong."""
    monkeypatch.setattr(kernels, "_fits_blas", lambda *operands: left)
    if device == "cpu":
        monkeypatch.setattr(kernels, "_MIXED", False)  # torch has it for GPUs alone

    def small(*shape, seed):
        return normal(*shape, dtype=torch.float32, device=device, seed=seed).round().to(dtype)

    x, w, grad = small(17, 63, seed=0), small(64, 63, seed=1), small(17, 64, seed=2)
    bias, add = small(64, seed=3), small(17, 63, seed=4).float()
    for activation in ("none", "relu"):
        got = kernels.kept_linear_fwd(x, w, bias, activation)
        want = reference.kept_linear_fwd(x.double(), w.double(), bias.double(), activation)
        assert all(torch.equal(a.double(), b) for a, b in zip(got, want, strict=True))
    for more, kind in ((None, dtype), (add, torch.float32), (None, torch.float32)):
        got = kernels.kept_linear_dx(grad, w, more, kind)
        wide = None if more is None else more.double()
        want = reference.kept_linear_dx(grad.double(), w.double(), wide, torch.float64)
        assert got.dtype == kind
        assert torch.equal(got.double(), want)
    for rows, cols in ((41, None), (None, 30), (64, 30), (0, 30), (None, None)):
        r, c = indices(64, rows, device), indices(70, cols, device)
        inner = x if cols is None else small(17, 64, seed=5)
        K = 63 if cols is None else 70
        for kind in (dtype, torch.float32):
            got = kernels.kept_linear_dw(grad, inner, [r], c, 64, K, kind)[0]
            wide = (grad.double(), inner.double())
            want = reference.kept_linear_dw(*wide, [r], c, 64, K, torch.float64)[0]
            assert got.dtype == kind
            assert torch.equal(got.double(), want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [None, 24, 0])
def test_gradients_of_three_weights_and_biases(count, device, poisoned):
    rows = [indices(40, count, device, i) for i in range(3)]
    width = 3 * (40 if count is None else count)
    grad = normal(130, width, dtype=torch.float32, device=device).round()
    x = normal(130, 17, dtype=torch.float32, device=device, seed=1).round()
    arguments = (rows, None, 40, 17, torch.float32)
    got, want = (
        kernels.kept_linear_dw(grad, x, *arguments),
        reference.kept_linear_dw(grad, x, *arguments),
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    # Sums that do not adjoin in memory are read where they lie.
    sums = torch.stack([grad.sum(0), torch.full((width,), float("nan"), device=device)], 1)[:, 0]
    got = kernels.kept_sums(sums, rows, 40, torch.float32)
    want = reference.kept_sums(sums, rows, 40, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(2, 3, 7, 4), (1, 1, 1, 1), (3, 5, 33, 10), (2, 0, 7, 4)])
def test_heads_side_by_side(shape, dtype, device, poisoned):
    B, H, T, d = shape
    grads = [normal(*shape, dtype=torch.float32, device=device, seed=i).round() for i in range(2)]
    grads.append(normal(B, T, H, d, dtype=torch.float32, device=device, seed=2).round())
    grads[2] = grads[2].transpose(1, 2)
    got, want = kernels.joined_heads(grads, dtype), reference.joined_heads(grads, dtype)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_heads_of_several_dtypes_are_refused():
    half, single = torch.zeros(2, 3, 5, 4, dtype=torch.float16), torch.zeros(2, 3, 5, 4)
    for grads in ([half, single, single], [single, half, single], [single, single, half]):
        with pytest.raises(TypeError, match="'triton' accepts one for all"):
            kernels.joined_heads(grads, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    x, w = (normal(9, 17, dtype=torch.float32, device=device, seed=i) for i in range(2))
    rows, cols = indices(9, 5, device), indices(17, 8, device)
    heads = [normal(2, 3, 5, 4, dtype=torch.float32, device=device)] * 3
    ops, wide = torch.ops.slimkern, torch.float32
    for op, arguments in (
        (ops.kept_weights, ([w], [w[:, 0]], [rows], cols, wide, 64)),
        (ops.kept_weights, ([w, w, w], [None, None, None], [rows] * 3, None, torch.float16, 1)),
        (ops.kept_linear_fwd, (x, w, None, "none")),
        (ops.kept_linear_fwd, (x, w, w[:, 0], "gelu")),
        (ops.kept_linear_dx, (x[:, :9], w, x, wide)),
        (ops.kept_linear_dw, (x[:, :5], x[:, :8], [rows], cols, 9, 17, wide)),
        (ops.kept_sums, (x[0, :5], [rows], 9, wide)),
        (ops.joined_heads, (heads, wide)),
    ):
        for backend in ("triton", "reference"):
            found = torch.library.opcheck(op.default, (*arguments, backend))
            assert set(found.values()) == {"SUCCESS"}, (op, found)


# ---- the blocks --------------------------------------------------------------------------------


def assert_within_eager_error(call, eager, make: Maker, dtype, device):
    """Output and every gradient: as near to fp64 as eager in that dtype, doubled, and roundings.

    Doubled because a block is a chain of products, each of whose roundings another order of sums
    may double; a sum over tokens or channels adds the square root of its length. Of a key's bias,
    whose gradient is zero, nothing but rounding is left.
    """
    leaves = [t.detach().to(device, dtype).requires_grad_() for t in make.leaves]
    exact = gradients_of(eager, [t.detach().double().requires_grad_() for t in leaves])
    want = gradients_of(eager, leaves)
    got = gradients_of(call, leaves)
    largest = max(t.norm() for t in exact[1:])
    for i, (a, b, c) in enumerate(zip(got, want, exact, strict=True)):
        assert a.shape == c.shape
        assert a.dtype == dtype
        assert not a.isnan().any(), i
        scale = torch.maximum(c.norm(), 1e-3 * largest)
        rounding = torch.finfo(dtype).eps * sum(got[0].shape) ** 0.5
        assert (a.double() - c).norm() <= 2 * (b.double() - c).norm() + rounding * scale, i


def gradients_of(call, leaves):
    y = call(leaves)
    random = torch.Generator().manual_seed(1)
    grad = torch.randn(y.shape, generator=random, dtype=torch.float64).to(y.device, y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("count", [None, 20, 1, 0])
@pytest.mark.parametrize("ending", ["norm", "residual", "plain"])
def test_masked_ffn(ending, count, dtype, device, poisoned):
    skip_truncation(dtype, device)
    make = Maker()
    weights, x = make.ffn(17, 63, "gelu", ending), make.tensor(2, 5, 17)
    keep = indices(63, count, device)
    build = rebuilder(weights, x, make)
    assert_within_eager_error(
        lambda leaves: masked_ffn(*build(leaves), keep, backend="triton"),
        lambda leaves: ffn_reference.masked_ffn(*build(leaves), keep),
        make, dtype, device,
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("masked", [None, "bool", "float"])
@pytest.mark.parametrize("count", [None, 3, 1])
def test_masked_attention(count, masked, dtype, device, poisoned):
    skip_truncation(dtype, device)
    if dtype == torch.float16 and device == "cpu":
        pytest.skip("torch's attention on a CPU is not that of a GPU in float16")
    make = Maker()
    weights, x = make.attention(24, 6, 4, "norm"), make.tensor(2, 7, 24)
    rows, mask = whole_heads(indices(6, count, device), 4), None
    if rows is None:
        rows = torch.arange(24, device=device)
    if masked is not None:
        mask = torch.ones(2, 1, 1, 7, dtype=torch.bool, device=device)
        mask[1, ..., 4:] = False
        mask = mask if masked == "bool" else (~mask).float() * -1e4
    build = rebuilder(weights, x, make)
    index = Kept(rows, rows, rows, rows)
    assert_within_eager_error(
        lambda leaves: masked_attention(*build(leaves), index, mask, backend="triton"),
        lambda leaves: attention_reference.masked_attention(
            *build(leaves), rows, mask if masked != "float" else mask.to(leaves[0].dtype)
        ),
        make, dtype, device,
    )  # fmt: skip


def rebuilder(weights, x, make: Maker):
    """``build(leaves)``: x and the weights again, from other leaves in the maker's order."""
    order = {id(leaf): i for i, leaf in enumerate(make.leaves)}

    def swapped(part, leaves):
        if isinstance(part, Tensor):
            return leaves[order[id(part)]]
        if is_dataclass(part):
            parts = {f.name: swapped(getattr(part, f.name), leaves) for f in fields(part)}
            return replace(part, **parts)
        return part

    return lambda leaves: (swapped(x, leaves), swapped(weights, leaves))
