"""packed_linear, ffn, attention_block, encoder_layer against fp64: every ISA, math and dtype."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import cache

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

from slimkern import cpu, ops

KINDS = list(CALL)
LAYERS = ["attention_block", "encoder_layer"]

SHAPES = [
    Shape(2, 17),
    Shape(1, 1, hidden=1, heads=1, kv_heads=1, head_dim=1, channels=1),
    Shape(1, 130, hidden=130, heads=5, kv_heads=5, head_dim=32, channels=63, norm="pre"),
    Shape(3, 63, hidden=17, heads=4, kv_heads=2, head_dim=8, gated=True, activation="silu"),
    Shape(5, 17, heads=6, kv_heads=1, head_dim=63, activation="relu", norm="both"),
    Shape(2, 63, gated=True, activation="gelu_tanh", norm="rms", causal=True, bias=False),
    Shape(2, 5, activation="quick_gelu", norm="none", residual=False, head_dim=130),
    Shape(4, 32, activation="squared_relu", heads=1, kv_heads=1, norm="none"),
    Shape(2, 17, heads=0, kv_heads=0, channels=0),
    Shape(2, 9, heads=0, kv_heads=0, channels=0, norm="none", residual=False),
    Shape(0, 17),
    Shape(3, 0),
    Shape(1, 97, hidden=384, heads=5, kv_heads=5, head_dim=32, channels=320),
]
IDS = [shape.id for shape in SHAPES]


@pytest.fixture
def restore():
    before = cpu.isa()
    yield
    cpu.set_isa(before)


@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised memory is all ones, which is NaN: what is read too early shows."""
    empty = torch.Tensor.new_empty

    def ones_empty(self, *size):
        made = empty(self, *size)
        return made.fill_(255 if made.dtype == torch.uint8 else float("nan"))

    monkeypatch.setattr(torch.Tensor, "new_empty", ones_empty)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def masks(shape):
    """Name -> mask: ragged and empty lengths, holes, additive ones."""
    g = torch.Generator().manual_seed(3)
    B, T = shape.B, shape.T
    lengths = torch.randint(0, T + 1, (B,), generator=g)
    if B > 1:
        lengths[0], lengths[1] = T, 0
    keep = torch.rand(B, T, generator=g) > 0.4
    added = torch.randn(B, T, generator=g).masked_fill(~keep, torch.finfo(torch.float32).min)
    return {"none": None, "lengths": lengths, "keep": keep, "added": added}


@cache
def stick_of(kind, shape, dtype, math, mask):
    """The measuring stick: the same on every instruction set, and for any number of threads."""
    weights, x = cast(make_weights(kind, shape), dtype), make_x(shape, dtype)
    return measuring_stick(kind, weights, x, math, masks(shape)[mask], None)


def check(kind, shape, dtype=torch.float32, math=None, mask="none", bias=None, x=None):
    """One call against the measuring stick; ``mask`` is a name of `masks`, ``x`` another layout."""
    weights = cast(make_weights(kind, shape), dtype)
    plain = make_x(shape, dtype)
    x = plain if x is None else x
    assert torch.equal(x, plain)
    packed = PACK[kind](weights, math=math)
    given = masks(shape)[mask]
    extra = {} if kind in ("linear", "ffn") else {"mask": given, "head_bias": bias}
    got = CALL[kind](x, packed, **extra)
    if bias is None:
        stick = stick_of(kind, shape, dtype, packed.math, mask)
    else:
        stick = measuring_stick(kind, weights, x, packed.math, given, bias)
    assert_within(got, stick, dtype)
    return got


def ways():
    """(isa, math, dtype) of this machine."""
    found = []
    before = cpu.isa()
    for isa in cpu.available_isas():
        cpu.set_isa(isa)
        found += [(isa, math, torch.float32) for math in ops.available_maths()]
        found += [(isa, "bf16", torch.bfloat16)]
    cpu.set_isa(before)
    return found


@pytest.mark.parametrize(("isa", "math", "dtype"), ways(), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_isa_and_math(kind, isa, math, dtype, restore, poisoned):
    cpu.set_isa(isa)
    for shape in SHAPES[:-1] if isa == "scalar" else SHAPES:
        for mask in masks(shape) if kind in LAYERS else ["none"]:
            check(kind, shape, dtype, math, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_every_output_is_written_by_any_number_of_threads(shape, count, dtype, poisoned, threads):
    threads(count)
    for mask in masks(shape):
        check("encoder_layer", shape, dtype, mask=mask)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "lengths", "keep", "added"])
def test_head_bias(kind, causal, mask, poisoned):
    shape = Shape(3, 63, heads=4, kv_heads=2, causal=causal)
    bias = torch.randn(4, 63, 63, generator=torch.Generator().manual_seed(5))
    check(kind, shape, mask=mask, bias=bias)
    check(kind, shape, mask=mask, bias=bias.bfloat16().transpose(1, 2))
    check(kind, shape, mask=mask, bias=bias[:, :1].expand(4, 63, 63))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "lengths", "keep"])
@pytest.mark.parametrize("count", [1, 2])
def test_several_blocks_of_keys_and_queries(count, mask, causal, poisoned, threads):
    """Longer than a block of keys, and than the queries of a task."""
    threads(count)
    shape = Shape(2, 1100, 17, 2, 1, 8, 32, causal=causal)
    check("attention_block", shape, mask=mask)


def test_many_channels(poisoned):
    """Channels are computed a chunk at a time."""
    for channels in (768, 769, 1700):
        check("ffn", Shape(1, 5, channels=channels))
        check("ffn", Shape(1, 5, channels=channels, gated=True), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_any_strides(kind, dtype):
    shape = Shape(3, 17, hidden=64)
    plain = make_x(shape, dtype)

    def wide():
        return torch.zeros(5, 20, 130, dtype=dtype)

    layouts = [
        plain.transpose(0, 1).contiguous().transpose(0, 1),
        plain.transpose(1, 2).contiguous().transpose(1, 2),
        wide()[1:4, 2:19, 3:67].copy_(plain),
        wide()[1:4, 2:19, 1:129:2].copy_(plain),
    ]
    want = check(kind, shape, dtype, x=plain)
    for x in layouts:
        assert not x.is_contiguous()
        assert torch.equal(check(kind, shape, dtype, x=x), want)
    packed = PACK[kind](cast(make_weights(kind, shape), dtype))
    same = plain[:1].expand(3, 17, 64)
    assert torch.equal(CALL[kind](same, packed), CALL[kind](same.contiguous(), packed))


@pytest.mark.parametrize("kind", ["linear", "ffn"])
def test_any_leading_dimensions(kind):
    weights = cast(make_weights(kind, Shape(1, 1)), torch.float32)
    packed = PACK[kind](weights)
    x = torch.randn(2, 3, 5, 63)
    want = CALL[kind](x.reshape(30, 63), packed)
    assert torch.equal(CALL[kind](x, packed).reshape(30, -1), want)
    for lead in ((), (0,), (2, 0, 3)):
        assert CALL[kind](torch.randn(*lead, 63), packed).shape == (*lead, want.shape[1])


@pytest.mark.parametrize("kind", LAYERS)
def test_the_forms_of_a_mask_agree(kind):
    shape = Shape(4, 33)
    weights = cast(make_weights(kind, shape), torch.float32)
    packed, x = PACK[kind](weights), make_x(shape, torch.float32)
    lengths = torch.tensor([33, 1, 0, 20])
    keep = torch.arange(33) < lengths[:, None]
    want = CALL[kind](x, packed, lengths)
    minimum = torch.finfo(torch.float32).min
    forms = [
        keep,
        torch.zeros(4, 33).masked_fill(~keep, float("-inf")),
        torch.zeros(4, 33).masked_fill(~keep, minimum),
        torch.zeros(4, 33).masked_fill(~keep, minimum).bfloat16(),
        torch.zeros(4, 33).masked_fill(~keep, minimum).double(),
        keep.t().contiguous().t(),
        keep[:, None, None, :].expand(4, 1, 33, 33)[:, 0, 0],
    ]
    for mask in forms:
        assert torch.equal(CALL[kind](x, packed, mask), want)
    full = CALL[kind](x, packed)
    assert torch.equal(CALL[kind](x, packed, torch.full((4,), 33)), full)
    assert torch.equal(CALL[kind](x, packed, torch.ones(4, 33).bool()), full)
    assert torch.equal(CALL[kind](x, packed, torch.zeros(4, 33)), full)


@pytest.mark.parametrize("kind", LAYERS)
def test_padding_is_neither_read_nor_left_unwritten(kind, poisoned):
    shape = Shape(3, 33)
    packed = PACK[kind](cast(make_weights(kind, shape), torch.float32))
    x, lengths = make_x(shape, torch.float32), torch.tensor([33, 5, 0])
    padding = torch.arange(33) >= lengths[:, None]
    want = CALL[kind](x, packed, lengths)
    assert (want[padding] == 0).all()
    got = CALL[kind](x.masked_fill(padding[..., None], float("nan")), packed, lengths)
    assert torch.equal(got, want)


@pytest.mark.parametrize(("isa", "math", "dtype"), ways(), ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_neither_on_threads_nor_on_its_neighbours(
    kind, isa, math, dtype, restore, threads
):
    """Bit for bit: a sequence alone, in a padded batch, on one thread or several."""
    cpu.set_isa(isa)
    shape = Shape(7, 33, hidden=65, head_dim=16)
    packed = PACK[kind](cast(make_weights(kind, shape), dtype), math=math)
    x = make_x(shape, dtype)
    lengths = torch.tensor([33, 1, 0, 20, 32, 3, 16])
    extra = (lengths,) if kind in LAYERS else ()
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(CALL[kind](x, packed, *extra))
    for other in results[1:]:
        assert torch.equal(results[0], other)
    for i, length in enumerate(lengths.tolist()):
        alone = CALL[kind](x[i : i + 1, :length], packed)
        assert torch.equal(alone[0], results[0][i, :length])


@pytest.mark.parametrize("kind", KINDS)
def test_infinity_and_nan_stay_in_their_sequence(kind):
    shape = Shape(3, 9)
    packed = PACK[kind](cast(make_weights(kind, shape), torch.float32))
    x = make_x(shape, torch.float32)
    want = CALL[kind](x, packed)
    for value in (float("nan"), float("inf")):
        bad = x.clone()
        bad[1, 4, 2] = value
        got = CALL[kind](bad, packed)
        assert got[1, 4].isnan().any() or got[1, 4].isinf().any()
        assert torch.equal(got[[0, 2]], want[[0, 2]])


def test_large_scores_do_not_overflow():
    shape = Shape(1, 40, norm="none")
    x = make_x(shape, torch.float32) * 300
    assert (
        CALL["attention_block"](
            x, PACK["attention_block"](cast(make_weights("attention_block", shape), torch.float32))
        )
        .isfinite()
        .all()
    )


def test_calls_from_several_threads_at_once(threads):
    threads(2)
    shape = Shape(4, 33)
    packed = ops.pack_encoder_layer(cast(make_weights("encoder_layer", shape), torch.float32))
    inputs = [make_x(shape, torch.float32, seed) for seed in range(4)]
    want = [ops.encoder_layer(x, packed) for x in inputs]
    failures = []

    def work(i):
        for _ in range(20):
            if not torch.equal(ops.encoder_layer(inputs[i], packed), want[i]):
                failures.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_scale_is_the_heads_own_unless_given():
    shape = Shape(2, 17)
    weights = cast(make_weights("attention_block", shape), torch.float32)
    x = make_x(shape, torch.float32)
    default = ops.attention_block(x, ops.pack_attention_block(weights))
    given = ops.pack_attention_block(replace(weights, scale=17**-0.5))
    other = ops.pack_attention_block(replace(weights, scale=1.0))
    assert torch.equal(ops.attention_block(x, given), default)
    assert not torch.allclose(ops.attention_block(x, other), default)
