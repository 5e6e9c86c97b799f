"""``BlockMaskedLinear``: adopted in place, the plain linear's equal with zeros, and released."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from slimkern.nn import BlockMasked, BlockMaskedLinear
from slimkern.nn.block_views import block_grid, block_views
from slimkern.ops import BlockMask
from slimkern.patterns.masks import block_masked, mask_blocks_, released

SHAPES = [((17, 63), (4, 1)), ((130, 17), (32, 32)), ((1, 63), (1, 16)), ((63, 1), (1, 1)),
          ((17, 130), (17, 2)), ((16, 64), (4, 8)), ((5, 3), (8, 8))]  # fmt: skip


def made(shape, seed=0, bias=True, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)


def blocks_of(shape, block, density=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(block_grid(shape, block), generator=generator) < density


def expanded(kept, shape, block):
    rows = kept.repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]]


def masked_of(linear, kept, block):
    masked = BlockMaskedLinear.adopt(linear, block)
    masked.set_mask(BlockMask.from_blocks(kept, block, tuple(linear.weight.shape)))
    return masked


@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_views_cover_a_matrix_once(shape, block):
    matrix = torch.zeros(shape[1], shape[0]).t()
    seen = torch.zeros(block_grid(shape, block))
    for view, place in block_views(matrix, block):
        view += 1
        seen[place] += view.sum((1, 3))
    assert (matrix == 1).all()
    sizes = expanded(torch.arange(seen.numel()).view(seen.shape), shape, block).flatten()
    assert torch.equal(torch.bincount(sizes, minlength=seen.numel()).float(), seen.flatten())


@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("shape", "block"), SHAPES)
def test_masked_is_dense_with_zeros(shape, block, density):
    kept = blocks_of(shape, block, density)
    plain = made(shape)
    masked = masked_of(copy.deepcopy(plain), kept, block)
    dense = expanded(kept, shape, block)
    with torch.no_grad():
        plain.weight.masked_fill_(~dense, 0)
    assert torch.equal(masked.weight, plain.weight)
    x = torch.randn(3, 5, shape[1] * 2, dtype=torch.float64)[..., ::2]
    own, other = (x.detach().requires_grad_() for _ in range(2))
    y, expected = masked(own), plain(other)
    grad = torch.randn_like(expected)
    y.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(own.grad, other.grad)
    torch.testing.assert_close(masked.bias.grad, plain.bias.grad)
    torch.testing.assert_close(masked.weight.grad, plain.weight.grad.masked_fill(~dense, 0))


def test_dense_gradients_come_where_asked_and_are_masked_on_request():
    shape, block = (17, 63), (4, 5)
    masked = masked_of(made(shape), blocks_of(shape, block), block)
    x = torch.randn(7, 63, dtype=torch.float64)
    masked.dense_gradient = True
    masked(x).square().sum().backward()
    dense = masked.weight.grad.clone()
    dead = ~masked.mask.dense()
    assert (dense[dead] != 0).all()
    masked.mask_gradient()
    assert torch.equal(masked.weight.grad, dense.masked_fill(dead, 0))


def test_it_is_adopted_in_place_and_released():
    linear = made((17, 63))
    parameters, seen = dict(linear.named_parameters()), []
    linear.register_forward_hook(lambda *a: seen.append(type(a[0])))
    keys, weight = list(linear.state_dict()), linear.weight.clone()
    masked = BlockMaskedLinear.adopt(linear, (4, 5))
    assert masked is linear
    assert isinstance(masked, nn.Linear)
    assert BlockMaskedLinear.adopt(masked, (4, 5)) is masked
    assert all(dict(masked.named_parameters())[n] is p for n, p in parameters.items())
    assert list(masked.state_dict()) == keys
    x = torch.randn(2, 63, dtype=torch.float64)
    torch.testing.assert_close(masked(input=x), nn.functional.linear(x, weight, linear.bias))
    assert "block=4x5, kept_blocks=1.0000" in repr(masked)
    kept = blocks_of((17, 63), (4, 5))
    masked.set_mask(BlockMask.from_blocks(kept, (4, 5), (17, 63)))
    with torch.no_grad():
        masked.weight.add_(1.0)  # whatever has moved masked weights
    expected = masked(x)
    plain = masked.release()
    assert type(plain) is nn.Linear
    assert plain is linear
    torch.testing.assert_close(plain(x), expected)
    assert seen == [BlockMaskedLinear, BlockMaskedLinear, nn.Linear]
    fresh = vars(made((17, 63)))
    assert set(vars(plain)) == set(fresh)
    assert plain._non_persistent_buffers_set == fresh["_non_persistent_buffers_set"]


def test_a_mask_changes_without_a_new_allocation():
    masked = masked_of(made((17, 63)), blocks_of((17, 63), (4, 5)), (4, 5))
    places = masked.weight.data_ptr(), masked.mask_bits.data_ptr()
    other = BlockMask.from_blocks(blocks_of((17, 63), (4, 5), seed=1), (4, 5), (17, 63))
    masked.set_mask(other)
    assert (masked.weight.data_ptr(), masked.mask_bits.data_ptr()) == places
    assert torch.equal(masked.mask.blocks(), other.blocks())


def test_a_nan_behind_the_mask_goes_when_it_is_zeroed():
    masked = masked_of(made((17, 63)), blocks_of((17, 63), (4, 5)), (4, 5))
    dead = ~masked.mask.dense()
    with torch.no_grad():
        masked.weight[dead] = float("nan")
    assert masked(torch.ones(63, dtype=torch.float64)).isfinite().all()
    masked.zero_masked()
    assert (masked.weight[dead] == 0).all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch"])
def test_it_is_copied_and_saved_like_any_module(bias, way):
    masked = masked_of(made((17, 63), bias=bias), blocks_of((17, 63), (4, 5)), (4, 5))
    if way == "torch":
        buffer = io.BytesIO()
        torch.save(masked, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    else:
        copied = copy.deepcopy(masked) if way == "deepcopy" else pickle.loads(pickle.dumps(masked))
    x = torch.randn(2, 63, dtype=torch.float64)
    assert type(copied) is BlockMaskedLinear
    assert torch.equal(copied(x), masked(x))
    plain = made((17, 63), bias=bias)  # a plain save is the masked model
    plain.load_state_dict(masked.state_dict())
    torch.testing.assert_close(plain(x), masked(x))


def test_the_mask_follows_the_module_and_casts_leave_it():
    masked = masked_of(made((17, 63)), blocks_of((17, 63), (4, 5)), (4, 5))
    bits = masked.mask_bits.clone()
    assert torch.equal(masked.to(torch.bfloat16).mask_bits, bits)
    assert masked(torch.ones(63, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert masked.to("meta").mask_bits.is_meta
    assert masked(torch.ones(2, 63, dtype=torch.bfloat16, device="meta")).shape == (2, 17)


def test_autocast_computes_as_of_a_plain_linear():
    kept = blocks_of((17, 63), (4, 5))
    masked = masked_of(made((17, 63), dtype=torch.float32), kept, (4, 5))
    plain = made((17, 63), dtype=torch.float32)
    plain.load_state_dict(masked.state_dict())
    x = torch.randn(9, 63)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = masked(x), plain(x)
        y.float().square().sum().backward()
    assert y.dtype == expected.dtype == torch.bfloat16
    assert masked.weight.grad.dtype == torch.float32
    exact = nn.functional.linear(x.double(), plain.weight.double(), plain.bias.double())
    # Inputs and weights rounded to bfloat16, sums in float32, the result rounded once more.
    size = nn.functional.linear(x.double().abs(), plain.weight.double().abs()) + 1
    eps = torch.finfo(torch.bfloat16).eps
    assert ((y.double() - exact).abs() <= 2 * eps * size).all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_it_is_recomputed_under_checkpointing(reentrant):
    masked = masked_of(made((17, 63)), blocks_of((17, 63), (4, 5)), (4, 5))
    x = torch.randn(4, 63, dtype=torch.float64, requires_grad=True)
    masked(x).square().sum().backward()
    wanted = masked.weight.grad, x.grad
    masked.weight.grad = x.grad = None
    checkpoint(masked, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(masked.weight.grad, wanted[0])
    assert torch.equal(x.grad, wanted[1])


def test_it_compiles_in_one_graph():
    masked = masked_of(made((17, 63)), blocks_of((17, 63), (4, 5)), (4, 5))
    compiled = torch.compile(masked, backend="aot_eager", fullgraph=True)
    for seed in (0, 3):  # a new mask needs no new graph
        masked.set_mask(BlockMask.from_blocks(blocks_of((17, 63), (4, 5), seed=seed), (4, 5),
                                              (17, 63)))  # fmt: skip
        x = torch.randn(4, 63, dtype=torch.float64)
        compiled(x).square().sum().backward()
        grad, masked.weight.grad = masked.weight.grad, None
        masked(x).square().sum().backward()
        torch.testing.assert_close(grad, masked.weight.grad)
        masked.weight.grad = None


def test_what_does_not_fit_is_refused():
    masked = BlockMaskedLinear.adopt(made((17, 63)), (4, 5))
    with pytest.raises(ValueError, match=r"masked in blocks \(4, 5\), not \(4, 1\)"):
        BlockMaskedLinear.adopt(masked, (4, 1))
    with pytest.raises(TypeError, match="takes the place of Linear, not of Embedding"):
        BlockMaskedLinear.adopt(nn.Embedding(3, 4), (1, 1))
    other = BlockMask.from_blocks(blocks_of((17, 63), (4, 1)), (4, 1), (17, 63))
    with pytest.raises(ValueError, match=r"blocks \(4, 1\).*accepted: \(4, 5\) in \(17, 63\)"):
        masked.set_mask(other)
    with pytest.raises(TypeError, match="'0' is a Embedding"):
        mask_blocks_(nn.Sequential(nn.Embedding(3, 4)), {"0": ((1, 1), torch.zeros(3, 4).bool())})


def test_masks_are_taken_off_for_a_while_or_for_good():
    model = nn.Sequential(made((17, 63)), made((5, 17)))
    kept = blocks_of((17, 63), (4, 5))
    mask_blocks_(model, {"0": ((4, 5), kept), "1": ((1, 1), torch.ones(5, 17).bool())})
    assert list(block_masked(model)) == ["0"], "a linear that keeps everything stays plain"
    x = torch.randn(2, 63, dtype=torch.float64)
    expected = model(x)
    model[0].dense_gradient, model[0].backend = True, "reference"
    with released(model) as masks:
        assert type(model[0]) is nn.Linear
        assert list(masks) == ["0"]
        torch.testing.assert_close(model(x), expected)
    assert torch.equal(model[0].mask.blocks(), kept)
    assert (model[0].dense_gradient, model[0].backend) == (True, "reference")
    with pytest.raises(RuntimeError, match="why"), released(model, for_good=True):
        raise RuntimeError("why")
    assert isinstance(model[0], BlockMasked)
    with released(model, for_good=True):
        pass
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(x), expected)


def test_conv1d_is_masked_in_outputs_times_inputs():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layer = Conv1D(17, 63).double()
    kept = blocks_of((17, 63), (4, 5))
    model = nn.Sequential(layer)
    before = layer.weight.data_ptr()
    mask_blocks_(model, {"0": ((4, 5), kept)})
    assert isinstance(layer, Conv1D)
    assert layer.weight.data_ptr() == before
    dense = expanded(kept, (17, 63), (4, 5))
    assert (layer.weight[~dense.t()] == 0).all()
    assert (layer.weight[dense.t()] != 0).all()
    x = torch.randn(3, 4, 63, dtype=torch.float64)
    expected = nn.functional.linear(x, layer.weight.t(), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    layer(x).square().sum().backward()
    assert layer.weight.grad.shape == (63, 17)
    assert (layer.weight.grad[~dense.t()] == 0).all()
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    assert "nf=17, nx=63, block=4x5" in repr(layer)
    assert type(layer.release()) is Conv1D
    torch.testing.assert_close(layer(x), expected)
