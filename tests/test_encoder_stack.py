"""``encoder_stack``: several layers in one call, bit by bit what they are one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fused_cases import Shape, assert_within, cast, make_weights, make_x, measuring_stick

from slimkern import cpu, ops
from slimkern.ops.encoder_stack import reference

# Of one hidden width; other heads and channels in each.
LAYERS = (
    Shape(3, 19, hidden=63, heads=3, kv_heads=3, channels=130),
    Shape(3, 19, hidden=63, heads=1, kv_heads=1, channels=1, norm="pre"),
    Shape(3, 19, hidden=63, heads=4, kv_heads=2, head_dim=16, channels=17, gated=True),
    Shape(3, 19, hidden=63, heads=3, kv_heads=3, channels=63, norm="both", activation="relu"),
)
MASKS = {
    "none": None,
    "lengths": torch.tensor([0, 5, 19]),
    "keep": (torch.arange(19) < torch.tensor([[19], [7], [1]])).flip(1),
    "added": torch.zeros(3, 19).masked_fill(torch.arange(19) >= 11, float("-inf")),
}


def weights_of(count, dtype=torch.float32):
    return [
        cast(make_weights("encoder_layer", s, seed=i), dtype) for i, s in enumerate(LAYERS[:count])
    ]


def packs_of(count, dtype=torch.float32, **how):
    return [ops.pack_encoder_layer(w, **how) for w in weights_of(count, dtype)]


def one_by_one(x, packs, *extra):
    for packed in packs:
        x = ops.encoder_layer(x, packed, *extra)
    return x


@pytest.mark.parametrize("isa", cpu.available_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_it_is_the_layers_one_by_one(count, dtype, isa):
    before = cpu.isa()
    cpu.set_isa(isa)
    try:
        packs, x = packs_of(count, dtype), make_x(LAYERS[0], dtype)
        for rows in (x, x.transpose(0, 1).contiguous().transpose(0, 1), x[:, ::2], x[:0], x[:, :0]):
            assert torch.equal(ops.encoder_stack(rows, packs), one_by_one(rows, packs))
        for mask in MASKS.values():
            want = one_by_one(x, packs, mask)
            assert torch.equal(ops.encoder_stack(x, packs, mask), want)
            assert not want.isnan().any()
    finally:
        cpu.set_isa(before)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_bias_of_heads_and_threads(threads):
    torch.set_num_threads(threads)
    shape = replace(LAYERS[0], B=40, T=33)
    packs = [
        ops.pack_encoder_layer(cast(make_weights("encoder_layer", shape, seed=i), torch.float32))
        for i in range(3)
    ]
    x, bias = make_x(shape, torch.float32), torch.randn(3, 33, 33)
    lengths = torch.arange(40) % 34
    got = ops.encoder_stack(x, packs, lengths, bias)
    assert torch.equal(got, one_by_one(x, packs, lengths, bias))


@pytest.mark.parametrize("mask", ["none", "lengths"])
@pytest.mark.parametrize("math", ops.available_maths())
def test_it_is_the_equation(math, mask):
    weights, x = weights_of(4), make_x(LAYERS[0], torch.float32)
    packs = [ops.pack_encoder_layer(w, math=math) for w in weights]
    stick = measuring_stick("encoder_stack", weights, x, math, MASKS[mask], None)
    assert_within(ops.encoder_stack(x, packs, MASKS[mask]), stick, torch.float32)


def test_the_equation_is_that_of_the_layers():
    weights, x = weights_of(3), make_x(LAYERS[0], torch.float64).float()
    want = x
    for w in weights:
        want = ops.encoder_layer(want, ops.pack_encoder_layer(w))
    torch.testing.assert_close(reference.encoder_stack(x, weights), want)


def test_opcheck():
    packs, x = packs_of(2), make_x(LAYERS[0], torch.float32)
    tensors = [packed.data for packed in packs]
    for rows, mask in ((x, None), (x.transpose(0, 1)[:3, :3], torch.tensor([0, 1, 3]))):
        arguments = (rows, tensors, ["", ""], mask, None, "cpu")
        checked = torch.library.opcheck(torch.ops.slimkern.encoder_stack.default, arguments)
        assert set(checked.values()) == {"SUCCESS"}, checked


def test_refusals():
    packs, x = packs_of(2), make_x(LAYERS[0], torch.float32)
    ffn = ops.pack_ffn(weights_of(1)[0].ffn)
    wide = Shape(3, 19, hidden=64, channels=5)
    other = ops.pack_encoder_layer(cast(make_weights("encoder_layer", wide), torch.float32))
    for given, kind, message in (
        ([], ValueError, "packs is empty; encoder_stack accepts: one or more"),
        ([ffn, *packs], TypeError, "packed holds ffn; encoder_stack accepts: encoder_layer"),
        ([*packs, ffn], TypeError, r"packs\[2\] holds ffn; encoder_stack accepts: encoder_layer"),
        ([*packs, other], ValueError, r"packs\[2\] takes rows of 64; .* packs\[0\], 63"),
        ([packs[0], replace(packs[1], backend="triton")], ValueError, r"packs\[1\] is for .*'cpu'"),
    ):
        with pytest.raises(kind, match=message):
            ops.encoder_stack(x, given)
    with pytest.raises(ValueError, match=r"a last dimension of 63"):
        ops.encoder_stack(x[..., :9], packs)
    with pytest.raises(ValueError, match=r"mask has shape \(3, 18\)"):
        ops.encoder_stack(x, packs, torch.ones(3, 18))
    with pytest.raises(ValueError, match="length"):
        ops.encoder_stack(x, packs, torch.tensor([1, 2, 20]))
    with pytest.raises(RuntimeError, match="unfuse_"):
        ops.encoder_stack(x.requires_grad_(), packs)


def test_a_damaged_pack_is_refused_before_anything_is_computed(monkeypatch):
    packs, x = packs_of(3), make_x(LAYERS[0], torch.float32)
    outs, new_empty = [], torch.Tensor.new_empty

    def poisoned(self, *size, **how):
        made = new_empty(self, *size, **how)
        if made.is_floating_point():
            outs.append(made.fill_(-7.0))
        return made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    ops.encoder_stack(x, packs)
    assert outs.pop().ne(-7.0).any()
    packs[2] = replace(packs[2], data=packs[2].data[:-64])
    with pytest.raises(ValueError, match="pack"):
        ops.encoder_stack(x, packs)
    assert outs.pop().eq(-7.0).all()
    with pytest.raises(ValueError, match="head_bias has 3 heads; accepted: 1"):
        ops.encoder_stack(x, packs[:2], None, torch.zeros(3, 19, 19))
    assert outs.pop().eq(-7.0).all()
