"""Counting: exactly what the slimmed model has, and what the counter of operations sees."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from tiny_models import FAMILIES, FFN, HEAD_DIM, HEADS, HIDDEN, LAYERS, OTHERS, Gated, mlp
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import slimkern
from slimkern.costs import Costs, count_macs, count_parameters
from slimkern.plan import PlanEntry, SlimPlan

BATCH, TOKENS = 2, 9


def uneven(groups, seed: int) -> SlimPlan:
    """A plan with another random width for every group."""
    draw = random.Random(seed)
    return SlimPlan(
        tuple(
            PlanEntry(
                g, tuple(sorted(draw.sample(range(g.num_units), draw.randint(1, g.num_units))))
            )
            for g in groups
        )
    )


def widths_of(plan: SlimPlan) -> dict[str, int]:
    return {e.group.name: len(e.keep) for e in plan}


def slimmed(model: nn.Module, plan: SlimPlan) -> nn.Module:
    return slimkern.slim_(copy.deepcopy(model), plan)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def build(name: str) -> tuple[nn.Module, tuple[slimkern.Group, ...]]:
    if name == "mlp":
        model: nn.Module = mlp(10, 24, 16, 10)
    elif name == "gated":
        model = Gated()
    elif name == "tied":  # the decoder is the embedding
        model = FAMILIES["bert"]("ForMaskedLM")
    else:
        model = {**FAMILIES, **OTHERS}[name]()
    example = torch.zeros(4, 10) if name in ("mlp", "gated") else None
    return model, slimkern.discover(model, example).groups


@pytest.mark.parametrize(
    "name", ["bert", "distilbert", "mpnet", "tied", "gated", "mlp", "llama", "t5"]
)
def test_parameters_are_those_of_the_slimmed_model(name):
    model, groups = build(name)
    costs = count_parameters(model, groups)
    assert costs.unit == "parameters"
    assert groups
    assert costs.total({}) == parameters(model)
    for seed in range(5):
        plan = uneven(groups, seed)
        assert costs.total(widths_of(plan)) == parameters(slimmed(model, plan))


def test_a_width_costs_what_its_slices_hold():
    model, groups = build("bert")
    costs = count_parameters(model, groups)
    for group in groups:
        if group.kind == "ffn":
            assert costs.of(group.name, 7) == 7 * (2 * HIDDEN + 1)
        else:
            assert costs.of(group.name, 3) == 3 * HEAD_DIM * (4 * HIDDEN + 3)
    cut = sum(costs.of(g.name, g.num_units) for g in groups)
    assert costs.fixed == parameters(model) - cut


def test_groups_that_are_left_out_are_fixed():
    model, groups = build("distilbert")
    some = groups[:2]
    costs = count_parameters(model, some)
    assert set(costs.tables) == {g.name for g in some}
    plan = uneven(some, 0)
    assert costs.total(widths_of(plan)) == parameters(slimmed(model, plan))


def test_linears_that_two_groups_share_are_counted_exactly_and_bounded_by_the_tables():
    model, groups = build("mlp")
    for costs in (count_parameters(model, groups), count_macs(model, groups, (1, 1))):
        first, second = (g.name for g in groups)
        assert [set(j[:2]) for j in costs.joint] == [{first, second}]
        for a in range(1, groups[0].num_units + 1):
            for b in range(1, groups[1].num_units + 1):
                exact = costs.total({first: a, second: b})
                assert exact <= costs.fixed + costs.of(first, a) + costs.of(second, b)
        everything = costs.fixed + sum(costs.of(g.name, g.num_units) for g in groups)
        assert everything == costs.total({})


def counted(model: nn.Module) -> float:
    """Multiply-accumulates of one forward, as torch counts them: two operations each."""
    inputs = torch.zeros(BATCH, TOKENS, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(input_ids=inputs, attention_mask=torch.ones_like(inputs))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("family", ["bert", "distilbert", "mpnet"])
def test_macs_are_those_that_torch_counts(family):
    model = FAMILIES[family](attention="eager")
    if hasattr(model, "pooler"):
        model.pooler = None  # it sees one token of each sequence, and is counted for all
    groups = slimkern.discover(model).groups
    costs = count_macs(model, groups, (BATCH, TOKENS))
    assert costs.unit == "MACs"
    assert costs.total({}) == counted(model)
    for seed in range(3):
        plan = uneven(groups, seed)
        assert costs.total(widths_of(plan)) == counted(slimmed(model, plan))


def test_macs_follow_the_formulas():
    model = FAMILIES["bert"]()
    groups = slimkern.discover(model).groups
    batch, s = 3, 128
    costs = count_macs(model, groups, (batch, s))
    head = 4 * s * HIDDEN * HEAD_DIM + 2 * s**2 * HEAD_DIM
    channel = 2 * s * HIDDEN
    for group in groups:
        assert costs.of(group.name, 1) == batch * (head if group.kind == "mha" else channel)
    pooler = s * HIDDEN**2
    assert costs.fixed == batch * pooler
    assert costs.total({}) == batch * (pooler + LAYERS * (HEADS * head + FFN * channel))


def test_a_gated_channel_costs_three_linears():
    model, groups = build("gated")
    costs = count_macs(model, groups, (1, 5))
    assert costs.of("down", 1) == 3 * 5 * 10


def test_of_interpolates_between_entries_and_refuses_outside():
    costs = Costs("seconds", 1.0, {"a": {2: 0.0, 4: 1.0, 10: 4.0}, "b": {3: 0.5}})
    assert costs.of("a", 4) == 1.0
    assert costs.of("a", 3) == 0.5
    assert costs.of("a", 8) == 3.0
    assert costs.total({}) == 1.0 + 4.0 + 0.5
    assert costs.total({"a": 2}) == 1.0 + 0.0 + 0.5
    for kept in (1, 11):
        with pytest.raises(ValueError, match=rf"kept is {kept} for 'a'; .* from 2 to 10 units"):
            costs.of("a", kept)
    with pytest.raises(KeyError, match="no group is named 'c'"):
        costs.of("c", 1)
    with pytest.raises(KeyError, match="no group is named 'c'"):
        costs.total({"c": 1})


def test_counting_refuses_what_does_not_fit():
    model, groups = build("bert")
    with pytest.raises(ValueError, match="names a group twice"):
        count_parameters(model, [groups[0], groups[0]])
    with pytest.raises(ValueError, match=r"shape is \(0, 8\)"):
        count_macs(model, groups, (0, 8))
    small = slimmed(model, uneven(groups, 0))
    for count in (count_parameters, count_macs):
        with pytest.raises(slimkern.SurgeryError, match="the plan speaks of"):
            count(small, groups)


def test_counting_leaves_the_model_alone():
    model, groups = build("mpnet")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    count_parameters(model, groups)
    count_macs(model, groups)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert "slim_plan" not in vars(model)
