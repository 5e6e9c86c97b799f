"""Degenerate data is survived, and said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from calibration_cases import blocks, prepared, texts, vectors
from tiny_models import FAMILIES, FFN, HEADS
from torch import Tensor, nn

from slimkern import OneShot, one_shot

EPS = torch.finfo(torch.float64).eps


def plus(model: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return x + h


def half(model: nn.Module, batches: Any, **options: Any) -> OneShot:
    return one_shot(model, batches, 0.5, 0.5, round_multiplier=8, **options)


@torch.no_grad()
def off(result: OneShot, model: nn.Module, batches: Any) -> tuple[float, float]:
    """How far the slim model's outputs are, at most, and the size of the dense ones."""
    held, _ = prepared(model, batches)
    pairs = [(b.real_outputs(b.call(result.model)), b.real_outputs(b.call(model))) for b in held]
    return (
        max(float((a - b).abs().max()) for a, b in pairs),
        max(float(b.abs().max()) for _, b in pairs),
    )


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fewer_tokens_than_channels(rows, dtype):
    """It works, with a note per group: what the data do not say stays what it was."""
    model = FAMILIES["bert"](dtype=dtype)
    result = half(model, texts([(1, rows)]))
    assert all(p.isfinite().all() for p in result.model.parameters())
    notes = [n for n in result.plan.notes if f": {rows} tokens choose among" in n]
    assert len(notes) == len(result.plan) == 6
    assert f"{rows} tokens choose among {FFN} channels; give more calibration data" in notes[1]
    # What it was calibrated on comes out nearly as before: least squares has enough freedom.
    error, size = off(result, model, texts([(1, rows)]))
    assert error < 0.2 * size


def test_enough_tokens_need_no_note():
    assert half(FAMILIES["bert"](), texts([(8, 20)])).plan.notes == ()


def with_channels(dead: int, constant: int) -> nn.Module:
    """BERT in fp64, the first of whose FFN channels are 0 and the next ones constant."""
    model = FAMILIES["bert"](dtype=torch.float64)
    for layer in model.encoder.layer:
        linear = layer.intermediate.dense
        linear.weight.data[: dead + constant] = 0
        linear.bias.data[:dead] = 0
    return model


@pytest.mark.parametrize("criterion", ["obs", "fluctuation"])
def test_dead_and_constant_channels_go_and_nothing_is_lost(criterion):
    """The bias makes up for constants; heads stay, so that all is exact."""
    model = with_channels(16, 24)
    result = one_shot(model, texts(), 0.5, round_multiplier=8, criterion=criterion)
    for entry in result.plan:
        assert entry.keep == tuple(range(40, 80))
        assert entry.error <= 1e3 * EPS
    error, size = off(result, model, texts())
    assert error <= 1e4 * EPS * size


@pytest.mark.parametrize("add_bias", [True, False])
def test_a_constant_goes_only_where_a_bias_makes_up_for_it(add_bias):
    model = blocks(plus).double()
    for first, second in zip(model.first, model.second):
        first.weight.data[5] = 0
        first.bias.data[5] = 30.0
        second.bias = None
    result = one_shot(model, vectors(), 0.5, round_multiplier=4, add_bias=add_bias)
    assert [5 in entry.keep for entry in result.plan] == [not add_bias] * 3


def test_dead_and_constant_channels_that_stay_keep_their_weights():
    model = with_channels(16, 24)
    result = one_shot(model, texts(), 0.2, round_multiplier=8, criterion="magnitude")
    for entry in result.plan:
        quiet = torch.tensor([unit < 40 for unit in entry.keep])
        assert quiet.any()
        before = model.get_parameter(f"{entry.group.name}.weight")[:, list(entry.keep)]
        after = result.model.get_parameter(f"{entry.group.name}.weight")
        assert torch.allclose(after[:, quiet], before[:, quiet], rtol=0, atol=1e3 * EPS)
        assert not torch.allclose(after[:, ~quiet], before[:, ~quiet], rtol=1e-6)


@pytest.mark.parametrize("options", [{"ffn2_sparsity": 0.5}, {"target_params": 800}], ids=str)
def test_layers_that_say_nothing(options):
    """A second linear of zeros, and one whose inputs never vary."""
    model = blocks(plus)
    model.second[0].weight.data.zero_()
    model.first[1].weight.data.zero_()
    result = one_shot(model, vectors(), round_multiplier=4, **options)
    assert all(p.isfinite().all() for p in result.model.parameters())
    assert all(0 <= e.error < 1 for e in result.plan)


def test_repeated_sentences_weigh_nothing():
    """Every batch three times over: the same means, so the same choice and weights to rounding."""
    model, once = FAMILIES["bert"](dtype=torch.float64), texts([(8, 12)] * 3)
    one, three = half(model, once), half(model, once * 3)
    for a, b in zip(one.plan, three.plan):
        assert a.keep == b.keep
        assert a.error == pytest.approx(b.error, rel=1e-6)
    for a, b in zip(one.model.parameters(), three.model.parameters()):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)


def test_one_token_over_and_over():
    """Nothing varies: the weights stay, the bias makes up, the outputs are what they were."""
    model = FAMILIES["bert"](dtype=torch.float64)
    ids = torch.full((4, 1), 7)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * 3
    result = half(model, batches)
    error, size = off(result, model, batches)
    assert error <= 1e4 * EPS * size
    assert all(e.error == 0 for e in result.plan)


def test_batches_of_very_different_lengths():
    shapes = [(1, 1), (2, 38), (5, 3)]
    result = half(FAMILIES["mpnet"](), texts(shapes))
    assert all(0 < e.error < 1 for e in result.plan)
    assert [len(e.keep) for e in result.plan if e.group.kind == "mha"] == [HEADS // 2]


def test_more_data_than_the_selection_looks_at():
    """Units are chosen on a part, repairs made on all: the fewer, the more is noted."""
    model, batches = FAMILIES["bert"](), texts([(3, 20)] * 12)
    some, every = half(model, batches, selection_tokens=150), half(model, batches)
    assert some.plan != every.plan
    assert every.plan.notes == ()
    few = half(model, batches, selection_tokens=60)
    assert len(few.plan.notes) == 3  # one batch of 57: enough for 48 channels, not for 80
    assert all(f"57 tokens choose among {FFN} channels" in note for note in few.plan.notes)
