"""Fused blocks and models on the Triton kernels: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from fused_cases import Shape, assert_within, cast, make_weights, make_x, measuring_stick

from slimkern import ops

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from triton_cases import DEVICES, DTYPE_IDS, DTYPES, moved, skip_interpreted_bf16

from slimkern.ops import _device_pack, _packed
from slimkern.ops._row_norm import row_norm

PACK = {
    "linear": lambda w, **k: ops.pack_linear(w.weight, w.bias, **k),
    "ffn": ops.pack_ffn,
    "attention_block": ops.pack_attention_block,
    "encoder_layer": ops.pack_encoder_layer,
}
CALL = {
    "linear": ops.packed_linear,
    "ffn": ops.ffn,
    "attention_block": ops.attention_block,
    "encoder_layer": ops.encoder_layer,
}
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


@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised memory is NaN: what a kernel forgets to write, or reads too early, shows."""
    empty = torch.empty

    def nan_empty(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", nan_empty)


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
@pytest.mark.parametrize("math", ["tf32", "bf16"])
@pytest.mark.parametrize("kind", CALL)
def test_float32_computed_with_narrower_products(kind, math, device, poisoned):
    if device == "cpu" and math == "tf32":
        math = "fp32"  # which is what the interpreter makes of it
    skip_interpreted_bf16(torch.bfloat16 if math == "bf16" else torch.float32, device)
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
def test_a_pack_is_laid_out_for_wide_loads(device):
    shape = Shape(1, 2, channels=70, head_dim=9)
    weights = moved(make_weights("encoder_layer", shape), device)
    packed = ops.pack_encoder_layer(cast(weights, torch.float16), backend="triton")
    assert (packed.backend, packed.math, packed.kind) == ("triton", "fp16", "encoder_layer")
    assert packed.nbytes == packed.data.numel()
    spec = _device_pack.read_spec(packed.spec)
    parts = dict(zip(spec.names, packed.parts))
    assert parts["gate.weight"].shape == (128, 63)
    assert parts["down.weight"].shape == (63, 128)
    assert parts["qkv.weight"].shape == (128, 63)
    assert not parts["gate.weight"][70:].any()
    assert not parts["down.weight"][:, 70:].any()
    assert not parts["gate.bias"][70:].any()
    for part in packed.parts:
        assert (part.data_ptr() - packed.data.data_ptr()) % 256 == 0
        assert part.dim() == 1 or part.stride(0) * part.element_size() % 16 == 0
    exact = ops.pack_ffn(cast(weights.ffn, torch.float32), math="fp32", backend="triton")
    gate = exact.parts[0]
    assert gate.shape == (128, 63)
    assert gate.stride(0) == 1
    assert gate.stride(1) * 4 % 16 == 0
    assert torch.equal(gate[:70], weights.ffn.fc1.weight.float())
    other = copy.deepcopy(packed)
    x = make_x(shape, torch.float16).to(device)
    assert torch.equal(ops.encoder_layer(x, packed), ops.encoder_layer(x, other))


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


def test_what_does_not_fit_is_refused():
    shape = Shape(2, 5, hidden=9, head_dim=4, channels=6)
    weights = cast(make_weights("encoder_layer", shape), torch.float32)
    x = make_x(shape, torch.float32)
    packed = ops.pack_encoder_layer(weights, backend="triton")
    for mask, error, message in (
        (torch.ones(2, 4).bool(), ValueError, r"accepted: \[2, 5\]"),
        (torch.ones(3, dtype=torch.int64), ValueError, r"accepted: \[2\]"),
        (torch.ones(2, 5).int(), TypeError, "accepted: torch.int64"),
    ):
        with pytest.raises(error, match=message):
            ops.encoder_layer(x, packed, mask)
    for bias, error, message in (
        (torch.ones(3, 5, 4), ValueError, "head_bias has shape"),
        (torch.ones(2, 5, 5), ValueError, "head_bias is of 2 heads; accepted: 3"),
        (torch.ones(3, 5, 5).long(), TypeError, "head_bias has dtype"),
    ):
        with pytest.raises(error, match=message):
            ops.encoder_layer(x, packed, None, bias)
    with pytest.raises(TypeError, match=r"x has dtype torch\.float64"):
        ops.encoder_layer(x.double(), packed)
    with pytest.raises(ValueError, match="packed is for the CPU"):
        ops.encoder_layer(x, replace(packed, spec=""))
    with pytest.raises(ValueError, match=r"math is 'bf16x3'; accepted for torch\.float32"):
        ops.pack_encoder_layer(weights, backend="triton", math="bf16x3")
    with pytest.raises(TypeError, match=r"weights have dtype torch\.float64; accepted"):
        ops.pack_ffn(cast(weights.ffn, torch.float64), backend="triton")
    fc2 = replace(weights.ffn.fc2, weight=torch.zeros(9, 7))
    with pytest.raises(
        ValueError, match=r"down has a weight of shape \(9, 7\); accepted: \[9, 6\]"
    ):
        ops.pack_ffn(replace(weights.ffn, fc2=fc2), backend="triton")


def test_backends_of_packs():
    assert _packed.PACKED_BACKENDS.choose(None, torch.device("cuda")) == "triton"
    with pytest.raises(ValueError, match="linear is on meta; accepted: cpu, cuda"):
        ops.pack_linear(torch.zeros(3, 4, device="meta"))


def test_precision_on_gpus_is_torchs_own():
    before = torch.get_float32_matmul_precision()
    rocm = torch.version.hip is not None
    wanted = {"highest": "fp32", "high": "fp32" if rocm else "tf32", "medium": "bf16"}
    try:
        for name, math in wanted.items():
            torch.set_float32_matmul_precision(name)
            assert ops.current_precision("cuda") == name
            assert ops.choose_math(torch.float32, None, "cuda") == math
            assert ops.choose_math(torch.float16, None, "cuda") == "fp16"
            assert ops.choose_math(torch.bfloat16, None, "cuda") == "bf16"
    finally:
        torch.set_float32_matmul_precision(before)
    for name, math in wanted.items():
        assert ops.choose_math(torch.float32, name, "cuda") == math
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        old = matmul.fp32_precision
        try:
            matmul.fp32_precision = "tf32"
            assert ops.current_precision("cuda") == "high"
            assert ops.current_precision() == before
        finally:
            matmul.fp32_precision = old
