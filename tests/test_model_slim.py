"""``model_slim`` on zeros that are already there: what goes, what stays, what is refused."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from auto_slim_cases import assert_as_exact_as, zeroed
from tiny_models import FAMILIES, FFN, HEAD_DIM, OTHERS, Gated
from torch import nn

from slimkern.auto_slim import model_slim
from slimkern.criteria import importance
from slimkern.discovery import discover
from slimkern.plan import PlanEntry, SlimPlan, make_plan
from slimkern.surgery import mask_


@pytest.mark.parametrize("seed", [0, 1])
def test_zeros_that_are_already_there_go_and_dead_channels_of_lowest_index_stay(seed):
    torch.manual_seed(seed)  # and no random number plays a part
    model = FAMILIES["bert"]()
    dead = [1, 5, *range(20, 72)]  # 80 - 54 = 26 live, 32 stay
    zeroed(model, "encoder.layer.1.output.dense", dead)
    zeroed(model, "encoder.layer.2.attention.output.dense", [0, 2], HEAD_DIM)
    before = copy.deepcopy(model)
    model_slim(model)
    assert {e.group.name: e.keep for e in model.slim_plan} == {
        "encoder.layer.1.output.dense": tuple(
            sorted({*range(80)} - {*dead} | {1, 5, 20, 21, 22, 23})
        ),
        "encoder.layer.2.attention.output.dense": (1, 3),
    }
    assert_as_exact_as(model, before, before)
    assert not [m for m in model.modules() if type(m) not in {type(b) for b in before.modules()}]


def test_the_rounding_is_an_argument_for_zeros_that_others_made():
    model = zeroed(FAMILIES["bert"](), "encoder.layer.0.output.dense", range(50))
    model_slim(model, round_multiplier=1)
    assert model.get_submodule("encoder.layer.0.output.dense").in_features == 30
    with pytest.raises(ValueError, match="round_multiplier must be at least 1, got 0"):
        model_slim(model, round_multiplier=0)


def test_a_layer_that_is_all_zero_keeps_one_dead_unit():
    model = zeroed(FAMILIES["bert"](), "encoder.layer.0.attention.output.dense", range(4), HEAD_DIM)
    zeroed(model, "encoder.layer.0.output.dense", range(FFN))
    before = copy.deepcopy(model)
    model_slim(model, round_multiplier=1)
    assert model.get_submodule("encoder.layer.0.output.dense").in_features == 1
    assert model.get_submodule("encoder.layer.0.attention.self.key").out_features == HEAD_DIM
    assert_as_exact_as(model, before, before)


def test_a_second_call_does_no_harm_and_says_so(caplog):
    model = zeroed(FAMILIES["bert"](), "encoder.layer.0.output.dense", range(48))
    with caplog.at_level(logging.INFO, "slimkern"):
        before = sum(p.numel() for p in model.parameters())
        model_slim(model)
        after = sum(p.numel() for p in model.parameters())
        assert f"1 groups cut, {before} -> {after} parameters" in caplog.text
        caplog.clear()
        weights = {n: id(p) for n, p in model.named_parameters()}
        assert model_slim(model) is model
        assert "has a masked or zero unit; the model is unchanged" in caplog.text
    assert {n: id(p) for n, p in model.named_parameters()} == weights


def test_zeros_that_rounding_keeps_are_told(caplog):
    model = zeroed(FAMILIES["bert"](), "encoder.layer.0.output.dense", range(10))
    with caplog.at_level(logging.WARNING, "slimkern"):
        model_slim(model, round_multiplier=64)
    assert "encoder.layer.0.output.dense: rounding 70 live of 80 units" in caplog.text
    assert model.get_submodule("encoder.layer.0.output.dense").in_features == FFN


def test_a_gpt2_raises_and_names_conv1d():
    model = OTHERS["gpt2"]("LMHeadModel")
    with pytest.raises(ValueError, match="GPT2LMHeadModel: its layers are Conv1D"):
        model_slim(model)


def test_a_model_in_which_nothing_is_found_raises_with_the_reasons():
    with pytest.raises(ValueError, match="nothing can be removed from this Linear"):
        model_slim(nn.Linear(4, 4), [torch.randn(2, 4)])


def test_a_gated_unit_loses_its_channels_in_both_branches():
    model = nn.Sequential(Gated(10, 64), nn.Linear(10, 10)).eval()
    zeroed(model, "0.down", range(0, 64, 2))
    x = torch.randn(7, 10)
    before = model.double()(x.double())
    model_slim(model, [x])
    assert [model[0].gate.out_features, model[0].up.out_features] == [32, 32]
    torch.testing.assert_close(model(x.double()), before)


def test_zeros_where_a_removal_would_not_be_exact_raise_when_there_is_nothing_else():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc0, self.fc1, self.fc2 = nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 6)
            self.other1, self.other2 = nn.Linear(6, 32), nn.Linear(32, 6)

        def forward(self, x):
            h = torch.tanh(self.fc0(x)).flip(-1)
            return self.fc2(torch.relu(self.fc1(h)) + h) + self.other2(torch.relu(self.other1(x)))

    model = zeroed(Residual(), "fc2", range(5))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="can't be removed exactly\n  refused fc2"):
        model_slim(model, [torch.randn(3, 6)])
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_a_refused_parameter_of_the_model_itself_is_no_module():
    class Rooted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(10))
            self.body = Gated(10, 64)

        def forward(self, x):
            return self.body(x @ self.weight)

    model = zeroed(Rooted(), "body.down", range(32))
    model_slim(model, [torch.randn(4, 10)])
    assert model.body.gate.out_features == 32


def test_an_optimizer_of_another_model_is_refused_before_anything_changes():
    model = zeroed(FAMILIES["bert"](), "encoder.layer.0.output.dense", range(48))
    text = repr(model)
    with pytest.raises(ValueError, match="holds none of the model's parameters"):
        model_slim(model, optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0))
    assert repr(model) == text


def test_a_plan_made_of_a_masked_or_partly_dead_model_takes_what_is_dead_first():
    model = FAMILIES["bert"]()
    found = discover(model)
    groups = [g for g in found if g.kind == "mha"]
    with torch.no_grad():  # large weights of a head that nothing reads
        for group in groups:
            for member in group.producers:
                model.get_submodule(member.name).weight[:HEAD_DIM] *= 100
    zeroed(model, groups[0].name, [0], HEAD_DIM)
    mask_(model, SlimPlan(tuple(PlanEntry(g, (1, 2, 3)) for g in groups[1:])))
    scores = importance(model, groups)
    assert all(s[0] == 0 and (s[1:] > 0).all() for s in scores.values())
    plan = make_plan(groups, scores, mha_sparsity=0.25)
    assert all(e.keep == (1, 2, 3) for e in plan)
