"""The theorem on plain modules: masked = slim; nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from surgery_cases import (
    FFN,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    MHA,
    PLAN,
    WIDTH,
    assert_equal_to_rounding,
    inputs,
    make_block,
)
from tiny_models import FAMILIES
from torch import nn

from slimkern.discovery import discover
from slimkern.discovery.groups import Group, Member
from slimkern.masks import carried_masks, is_masked, masked_beside, masked_plan
from slimkern.nn import MaskedLinear
from slimkern.plan import PlanEntry, SlimPlan
from slimkern.surgery import mask_, slim_, unmasked


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_masked_equals_zeroed_dense_equals_slim(dtype, bias):
    dense, masked, slim = (make_block(dtype, bias) for _ in range(3))
    x = inputs(dtype)
    with torch.no_grad():
        dead = [i for i in range(WIDTH) if i not in (0, 3, 4, 9, 16)]
        dense.fc2.weight[:, dead] = 0
        heads = dense.attention.o.weight.view(HIDDEN, HEADS, HEAD_DIM)
        heads[:, [0, 2]] = 0
    mask_(masked, PLAN)
    slim_(slim, PLAN)
    want, by_mask, by_cut = dense(x), masked(x), slim(x)
    assert_equal_to_rounding(by_mask, want, want)
    assert_equal_to_rounding(by_cut, want, want)
    assert torch.equal(masked.fc2.weight, dense.fc2.weight)
    assert torch.equal(masked.attention.o.weight, dense.attention.o.weight)


def test_masked_model_that_is_slimmed_equals_the_dense_one_that_is_slimmed():
    masked, slim = make_block(), slim_(make_block(), PLAN)
    slim_(mask_(masked, PLAN), PLAN)
    assert [type(m) for m in masked.modules()] == [type(m) for m in slim.modules()]
    for (name, a), (_, b) in zip(masked.state_dict().items(), slim.state_dict().items()):
        assert torch.equal(a, b), name
    assert not is_masked(masked)
    assert repr(masked) == repr(slim)


def test_sizes_counts_and_flags_after_the_cut():
    block = make_block()
    block.fc1.weight.requires_grad_(False)
    slim_(block, PLAN)
    assert (block.fc1.out_features, block.fc2.in_features) == (5, 5)
    assert (block.attention.num_heads, block.attention.all_head_size) == (2, 2 * HEAD_DIM)
    assert tuple(block.attention.q.weight.shape) == (2 * HEAD_DIM, HIDDEN)
    assert not block.fc1.weight.requires_grad
    assert block.fc1.bias.requires_grad
    assert block.slim_plan == PLAN


def test_gradients_and_hooks_survive():
    block = make_block()
    calls = []
    block.fc1.register_forward_hook(lambda *_: calls.append(1))
    block(inputs()).sum().backward()
    grad = block.fc1.weight.grad.clone()
    slim_(block, PLAN)
    assert torch.equal(block.fc1.weight.grad, grad[[0, 3, 4, 9, 16]])
    block(inputs())
    assert len(calls) == 2


def test_masks_can_be_moved_and_lifted():
    block, x = make_block(), inputs()
    before = block(x)
    full = SlimPlan((PlanEntry(FFN, tuple(range(WIDTH))), PlanEntry(MHA, tuple(range(HEADS)))))
    mask_(block, full)
    assert torch.equal(block(x), before)
    assert not is_masked(block)
    mask_(block, PLAN)
    assert isinstance(block.fc2, MaskedLinear)
    assert block.fc2.cols.tolist() == [0, 3, 4, 9, 16]
    assert masked_plan(block, [FFN, MHA]) == PLAN
    with unmasked(block, [FFN, MHA]):
        assert_equal_to_rounding(block(x), mask_(make_block(), PLAN)(x), before)
        assert block.attention.num_heads == HEADS
    assert block.attention.num_heads == 2
    assert masked_plan(block, [FFN, MHA]) == PLAN
    mask_(block, full)
    assert type(block.fc1) is type(block.fc2) is nn.Linear
    assert not hasattr(block, "mask_plan")
    assert block.attention.num_heads == HEADS


def test_masks_are_told_from_inside_and_outside_and_forgotten_when_they_are_gone():
    outer = nn.Sequential(mask_(make_block(), PLAN))
    names = {"0.fc2": (0, 3, 4, 9, 16), "0.attention.o": (1, 3)}
    assert {e.group.name: e.keep for e in carried_masks(outer)} == names
    assert masked_beside(outer, carried_masks(outer)) == []
    assert set(masked_beside(outer[0], SlimPlan(PLAN.entries[:1]))) == {
        f"attention.{n}" for n in "qkvo"
    }
    slim_(outer[0], PLAN)
    assert carried_masks(outer) == SlimPlan(())
    assert not hasattr(outer[0], "mask_plan")


def test_state_dict_of_a_masked_model_is_the_dense_one():
    block = mask_(make_block(), PLAN)
    assert list(block.state_dict()) == list(make_block().state_dict())
    reloaded = make_block()
    reloaded.load_state_dict(block.state_dict())
    assert_equal_to_rounding(reloaded(inputs()), block(inputs()), block(inputs()))


def test_a_masked_model_can_be_copied():
    block = mask_(make_block(), PLAN)
    other = copy.deepcopy(block)
    assert torch.equal(other(inputs()), block(inputs()))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_training_goes_on_with_the_carried_optimizer(optimizer):
    options = {"lr": 0.01} | ({"momentum": 0.9} if optimizer is torch.optim.SGD else {})
    # In double: the gradient of the keys' bias is zero but for rounding, and AdamW divides it by
    # its own size, which leaves of float32 nothing but the order of the sums.
    masked, slim = mask_(make_block().double(), PLAN), mask_(make_block().double(), PLAN)
    opt_masked = optimizer(masked.parameters(), **options)
    opt_slim = optimizer(slim.parameters(), **options)

    def step(model, opt):
        opt.zero_grad()
        model(inputs().double()).pow(2).mean().backward()
        opt.step()

    for _ in range(2):
        step(masked, opt_masked)
        step(slim, opt_slim)
    slim_(slim, PLAN, optimizer=opt_slim)
    for _ in range(2):
        step(masked, opt_masked)
        step(slim, opt_slim)
    want = slim_(masked, PLAN)
    for (name, a), (_, b) in zip(slim.named_parameters(), want.named_parameters()):
        assert (a - b).abs().max() <= 1e-6, name  # 4 steps of 0.01 on weights below 1: rounding
    x = inputs().double()
    assert slim(x).sub(want(x)).abs().max() <= 1e-5


def test_the_list_of_parameters_stays_the_one_that_an_optimizer_refers_to():
    block = make_block()
    optimizer = torch.optim.LBFGS(block.parameters())
    slim_(block, PLAN, optimizer=optimizer)
    assert {id(p) for p in optimizer._params} == {id(p) for p in block.parameters()}


def test_a_linear_can_be_cut_on_both_sides():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 3))
    first = Group("2", "ffn", 9, (Member("0", 1, "producer"),), (Member("2", 1, "consumer"),))
    second = Group("4", "ffn", 7, (Member("2", 1, "producer"),), (Member("4", 1, "consumer"),))
    plan = SlimPlan((PlanEntry(first, (0, 5, 8)), PlanEntry(second, (2, 3))))
    x = torch.randn(6, 4)
    masked = mask_(copy.deepcopy(model), plan)
    half = slim_(copy.deepcopy(masked), SlimPlan(plan.entries[:1]))
    assert isinstance(half[2], MaskedLinear)
    assert half[2].rows.tolist() == [2, 3]
    slim = slim_(copy.deepcopy(masked), plan)
    assert [tuple(slim[i].weight.shape) for i in (0, 2, 4)] == [(3, 4), (2, 3), (3, 2)]
    want = masked(x)
    for other in (half, slim):
        assert (other(x) - want).abs().max() <= 9 * 4 * torch.finfo(torch.float32).eps


def test_slimming_twice_composes_the_plan():
    block = slim_(make_block(), PLAN)
    again = Group("fc2", "ffn", 5, FFN.producers, FFN.consumers)
    slim_(block, SlimPlan((PlanEntry(again, (1, 4)),)))
    assert block.slim_plan["fc2"].keep == (3, 16)
    want = slim_(make_block(), block.slim_plan)
    assert torch.equal(block(inputs()), want(inputs()))


def test_what_is_tied_and_cut_alike_stays_tied():
    model = nn.ModuleList([make_block(), make_block()])
    model[1].fc1.weight, model[1].fc2.weight = model[0].fc1.weight, model[0].fc2.weight
    groups = (
        Group(f"{i}.fc2", "ffn", WIDTH, (Member(f"{i}.fc1", 1, "producer"),),
              (Member(f"{i}.fc2", 1, "consumer"),))
        for i in range(2)
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    slim_(model, SlimPlan(tuple(PlanEntry(g, (1, 2, 5)) for g in groups)), optimizer)
    assert model[1].fc1.weight is model[0].fc1.weight
    assert model[1].fc2.weight is model[0].fc2.weight
    assert model[0].fc2.weight.shape == (HIDDEN, 3)
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert held == {id(p) for p in model.parameters()}


def test_masks_on_the_meta_device_are_known_from_what_was_noted():
    block = mask_(make_block().to("meta"), PLAN)
    assert carried_masks(block) == PLAN
    moved = mask_(make_block(), PLAN).to("meta")
    assert carried_masks(moved) == PLAN
    assert slim_(moved, carried_masks(moved)).fc1.weight.shape == (5, HIDDEN)


@pytest.mark.parametrize("width", [64, 48])  # 48 is the hidden size, too
def test_the_configuration_says_the_width_as_long_as_all_layers_have_it(width):
    model = FAMILIES["bert"]("ForSequenceClassification")
    found = [g for g in discover(model) if not g.is_head]
    heads = [g for g in discover(model) if g.is_head]
    ffns = [g for g in found if g.kind == "ffn"]
    everything = [(g, range(width)) for g in ffns] + [(g, range(7)) for g in heads]
    slim_(model, SlimPlan(tuple(PlanEntry(g, tuple(k)) for g, k in everything)))
    assert model.config.intermediate_size == width
    again = [g for g in discover(model) if g.kind == "ffn" and not g.is_head]
    slim_(model, SlimPlan(tuple(PlanEntry(g, tuple(range(30))) for g in again)))
    assert model.config.intermediate_size == 30
    last = [g for g in discover(model) if g.kind == "ffn" and not g.is_head][1:]
    slim_(model, SlimPlan(tuple(PlanEntry(g, tuple(range(20))) for g in last)))
    assert model.config.intermediate_size == 30
