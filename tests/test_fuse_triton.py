"""Fused blocks and models on the Triton kernels: on a GPU where there is one, else interpreted."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fused_cases import (
    CALL,
    PACK,
    Shape,
    assert_within,
    cast,
    make_weights,
    make_x,
    measuring_stick,
)

from slimkern import ops

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from triton_cases import DEVICES, DTYPE_IDS, DTYPES, moved, skip_interpreted_bf16

from slimkern.ops import _device_blocks
from slimkern.ops._row_norm import row_norm

LAYERS = ["attention_block", "encoder_layer"]
ROWS = ["linear", "ffn"]
SHAPES = [
    Shape(2, 17),
    Shape(1, 1, hidden=1, heads=1, kv_heads=1, head_dim=1, channels=1),
    Shape(3, 9, hidden=17, heads=4, kv_heads=2, head_dim=8, gated=True, activation="silu"),
    Shape(2, 5, hidden=130, heads=2, kv_heads=2, activation="relu", norm="both", channels=63),
    Shape(2, 6, gated=True, activation="gelu_tanh", norm="rms", causal=True, bias=False),
    Shape(2, 5, activation="quick_gelu", norm="none", residual=False, head_dim=24),
    Shape(2, 5, activation="squared_relu", heads=1, kv_heads=1, norm="pre"),
    Shape(2, 5, heads=0, kv_heads=0, channels=0),
    Shape(2, 5, heads=0, kv_heads=0, channels=0, norm="none", residual=False),
    Shape(0, 17),
    Shape(3, 0),
]
IDS = [shape.id for shape in SHAPES]


def masks(shape):
    """Every form of a mask: ragged and empty lengths, holes, additive ones."""
    g = torch.Generator().manual_seed(3)
    B, T = shape.B, shape.T
    lengths = torch.randint(0, T + 1, (B,), generator=g)
    if B > 1:
        lengths[0], lengths[1] = T, 0
    keep = torch.rand(B, T, generator=g) > 0.4
    added = torch.randn(B, T, generator=g).masked_fill(~keep, torch.finfo(torch.float32).min)
    return [None, lengths, keep, added]


def check(kind, shape, dtype, device, math=None, mask=None, bias=None):
    """One call against the measuring stick."""
    weights, x = cast(make_weights(kind, shape), dtype), make_x(shape, dtype)
    packed = PACK[kind](moved(weights, device), math=math, backend="triton")
    given = [None if t is None else t.to(device) for t in (mask, bias)]
    extra = {} if kind in ROWS else {"mask": given[0], "head_bias": given[1]}
    with torch.no_grad():
        got = CALL[kind](x.to(device), packed, **extra).cpu()
    assert_within(got, measuring_stick(kind, weights, x, packed.math, mask, bias), dtype)
    return got


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_rows_are_within_eager_error(shape, dtype, device, poisoned):
    skip_interpreted_bf16(dtype, device)
    for kind in ROWS:
        check(kind, shape, dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_layers_are_within_eager_error(shape, dtype, device, poisoned):
    skip_interpreted_bf16(dtype, device)
    given = masks(shape)
    kinds = LAYERS * 2 if device == "cpu" else [k for k in LAYERS for _ in given]
    for kind, mask in zip(kinds, given * 2):
        check(kind, shape, dtype, device, mask=mask)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", range(4))
def test_a_bias_per_head_with_every_mask(form, device, poisoned):
    shape = SHAPES[0]
    bias = torch.randn(shape.heads, 17, 17, generator=torch.Generator().manual_seed(5))
    check("attention_block", shape, torch.float32, device, mask=masks(shape)[form], bias=bias)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_changes_nothing(kind, device):
    weights = cast(make_weights(kind, SHAPES[0]), torch.float32)
    packed = PACK[kind](moved(weights, device), math="fp32", backend="triton")
    x = make_x(SHAPES[0], torch.float32).to(device)
    with torch.no_grad():
        want = CALL[kind](x, packed)
        with torch.autocast(device, dtype=torch.bfloat16):
            got = CALL[kind](x, packed)
    assert torch.equal(got, want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("math", ["tf32", "bf16"])
@pytest.mark.parametrize("kind", CALL)
def test_float32_computed_with_narrower_products(kind, math, device, poisoned):
    if device == "cpu" and math == "tf32":
        math = "fp32"  # which is what the interpreter makes of it
    if math == "tf32":
        weights, x = make_weights(kind, SHAPES[0]), make_x(SHAPES[0], torch.float32)
        packed = PACK[kind](moved(cast(weights, torch.float32), device), math=math)
        exact = measuring_stick(kind, weights, x, "fp32", None, None).exact
        with torch.no_grad():
            got = CALL[kind](x.to(device), packed).cpu()
        error = (got - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        assert 2.0**-20 < error < 2.0**-9
        return
    check(kind, SHAPES[0], torch.float32, device, math=math, mask=None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_plain_projection_by_either_library(bias, by_torch, device, monkeypatch):
    monkeypatch.setattr(_device_blocks, "_by_torch", lambda *operands: by_torch)
    shape = replace(SHAPES[0], bias=bias)
    check("attention_block", shape, torch.float16, device, mask=masks(shape)[2])


def test_which_projections_are_the_librarys():
    """Halves on a GPU, with a bias of their own type."""
    cases = [
        (True, torch.bfloat16, torch.bfloat16, True),
        (True, torch.float16, None, True),
        (True, torch.bfloat16, torch.float32, False),
        (True, torch.float32, torch.float32, False),
        (False, torch.float16, torch.float16, False),
    ]
    for on_gpu, dtype, bias, want in cases:
        x = SimpleNamespace(is_cuda=on_gpu, dtype=dtype)
        b = None if bias is None else SimpleNamespace(dtype=bias)
        assert _device_blocks._by_torch(x, SimpleNamespace(dtype=dtype), b) == want


class Model(torch.nn.Module):
    def __init__(self, kind, shape, device):
        super().__init__()
        weights = moved(make_weights(kind, shape), device, torch.float32)
        self.kind, self.packed = kind, PACK[kind](weights, backend="triton")

    def forward(self, x, *masks):
        return CALL[self.kind](x * 1.5, self.packed, *masks) + 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", CALL)
def test_torch_compile_passes_over_the_ops(kind, device):
    shape = Shape(2, 5, hidden=9, head_dim=4, channels=6)
    model, x = Model(kind, shape, device), make_x(shape, torch.float32).to(device)
    given = (torch.tensor([3, 5], device=device),) if kind in LAYERS else ()
    torch._dynamo.reset()
    with torch.no_grad():
        want = model(x, *given)
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(x, *given)
    assert torch.equal(got, want)


@pytest.mark.parametrize("device", DEVICES)
def test_any_strides_and_more_dimensions(device):
    shape = SHAPES[0]
    weights = moved(cast(make_weights("encoder_layer", shape), torch.float32), device)
    x = make_x(shape, torch.float32).to(device)
    wide = torch.full((2, 17, 140), float("nan"), device=device)
    wide[..., 3:129:2] = x
    layer = ops.pack_encoder_layer(weights, backend="triton")
    inner = ops.pack_ffn(weights.ffn, backend="triton")
    for view in (wide[..., 3:129:2], x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(ops.encoder_layer(view, layer), ops.encoder_layer(x, layer))
        assert torch.equal(ops.ffn(view, inner), ops.ffn(x, inner))
        assert torch.equal(ops.ffn(view[0], inner), ops.ffn(x, inner)[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 5, 63])
def test_rows_behind_the_last_key_are_zeros(tokens, device, poisoned):
    """Of every mask, and of NaN rows: what is not attended to may be anything."""
    g = torch.Generator().manual_seed(tokens)
    keep = torch.rand(7, tokens, generator=g) < 0.3
    keep[0], keep[1] = True, False
    behind = ~keep.flip(1).cummax(1).values.flip(1)
    x = torch.randn(7 * tokens, 19, generator=g)
    x[behind.reshape(-1)] = float("nan")
    lengths = torch.where(behind.any(1), behind.float().argmax(1), tokens)
    added = torch.zeros(7, tokens).masked_fill(~keep, -1e30)
    half = torch.zeros(7, tokens).half().masked_fill(~keep, torch.finfo(torch.float16).min)
    for mask in (keep, added, half, lengths, keep.T.contiguous().T):
        y = torch.empty(x.shape, device=device)
        row_norm(x.to(device), mask=mask.to(device), tokens=tokens, y=y)
        want = x.masked_fill(behind.reshape(-1, 1), 0.0)
        assert torch.equal(y.cpu(), want)


@pytest.mark.parametrize("device", DEVICES)
def test_layers_in_one_call(device):
    shapes = [
        Shape(2, 5, hidden=9, heads=2, kv_heads=2, head_dim=4, channels=6),
        Shape(2, 5, hidden=9, heads=1, kv_heads=1, head_dim=4, channels=1, bias=False),
        Shape(2, 5, hidden=9, heads=3, kv_heads=3, head_dim=4, channels=17, gated=True),
    ]
    packs = [
        ops.pack_encoder_layer(
            moved(cast(make_weights("encoder_layer", shape, seed=i), torch.float32), device),
            backend="triton",
        )
        for i, shape in enumerate(shapes)
    ]
    x = make_x(shapes[0], torch.float32).to(device)
    for mask in (None, torch.tensor([0, 4], device=device)):
        want = x
        for packed in packs:
            want = ops.encoder_layer(want, packed, mask)
        assert torch.equal(ops.encoder_stack(x, packs, mask), want)
    tensors = [tensor for packed in packs[:2] for tensor in packed.tensors]
    arguments = (x, tensors, [packed.spec for packed in packs[:2]], None, None, "triton")
    checked = torch.library.opcheck(torch.ops.slimkern.encoder_stack.default, arguments)
    assert set(checked.values()) == {"SUCCESS"}, checked


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", CALL)
def test_opcheck(kind, device):
    shape = Shape(2, 5, hidden=9, head_dim=4, channels=6)
    packed = PACK[kind](
        moved(cast(make_weights(kind, shape), torch.float32), device), backend="triton"
    )
    x = make_x(shape, torch.float32).to(device)
    how = (packed.tensors, packed.spec)
    if kind in LAYERS:
        keep = torch.ones(2, 5, dtype=torch.bool, device=device)
        calls = [(x, *how, None, None), (x.transpose(0, 1)[:2, :2], *how, keep[:, :2], None)]
    else:
        calls = [(x[0], *how, *((6,) if kind == "linear" else ()))]
    name = {"linear": "packed_linear"}.get(kind, kind)
    for call in calls:
        op = getattr(torch.ops.slimkern, name).default
        checked = torch.library.opcheck(op, (*call, "triton"))
        assert set(checked.values()) == {"SUCCESS"}, checked
