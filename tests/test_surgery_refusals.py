"""Plans, models and optimizers that can't be cut are refused, and a refusal changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from surgery_cases import FFN, HIDDEN, PLAN, WIDTH, inputs, make_block
from torch import nn

from slimkern.cuts import SurgeryError
from slimkern.discovery.groups import Attribute, Between, Group, Member
from slimkern.masks import is_masked
from slimkern.plan import PlanEntry, SlimPlan
from slimkern.surgery import mask_, repair_, slim_


@pytest.mark.parametrize("verb", [mask_, slim_])
def test_a_compiled_model_is_refused_with_a_word_on_the_module_inside(verb):
    block = make_block()
    with pytest.raises(SurgeryError, match=r"model\._orig_mod"):
        verb(torch.compile(block, backend="eager"), PLAN)
    assert not is_masked(block)


def test_an_optimizer_whose_state_cannot_be_cut_is_refused_before_anything_changes():
    block = make_block()
    optimizer = torch.optim.Adafactor(block.parameters())
    block(inputs()).sum().backward()
    optimizer.step()
    before = {n: p.clone() for n, p in block.named_parameters()}
    with pytest.raises(ValueError, match="Adafactor"):
        slim_(block, PLAN, optimizer=optimizer)
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter, before[name])


def test_an_optimizer_that_keeps_its_state_in_containers_is_refused():
    block = make_block()
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    optimizer.state[block.fc2.weight]["blocks"] = [torch.zeros(3, 3)]
    with pytest.raises(ValueError, match="SGD: state 'blocks' is a list"):
        slim_(block, PLAN, optimizer=optimizer)
    assert block.fc1.out_features == WIDTH


def test_an_optimizer_of_another_model_is_refused_before_anything_changes():
    block = make_block()
    text = repr(block)
    with pytest.raises(ValueError, match="holds none of the model's parameters"):
        slim_(block, PLAN, optimizer=torch.optim.SGD(make_block().parameters(), lr=1.0))
    assert repr(block) == text
    rest = torch.optim.SGD([block.fc2.bias], lr=1.0)  # a part that is not cut is a part
    assert slim_(block, PLAN, optimizer=rest).fc1.out_features == 5


def _plan(group: Group, keep=(0,)) -> SlimPlan:
    return SlimPlan((PlanEntry(FFN, (1, 2)), PlanEntry(group, keep)))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (
            Group("x", "ffn", 3, (), (Member("x", 1, "consumer"),)),
            "'x': the model has no such module",
        ),
        (
            Group("attention.o", "mha", 5, (), (Member("attention.o", 6, "consumer"),)),
            "'attention.o': the plan speaks of 5 units of 6 columns, but its weight has 24",
        ),
        (
            Group("attention", "mha", 5, (), (Member("attention", 6, "consumer"),)),
            "only a plain nn.Linear can be cut, this is Attention",
        ),
        (
            Group(
                "o", "mha", 4, (), (Member("attention.o", 6, "consumer"),), (Between("b", 0, 1),)
            ),
            "'b': the model has no such parameter",
        ),
        (
            Group(
                "o",
                "mha",
                4,
                (),
                (Member("attention.o", 6, "consumer"),),
                (Between("attention.o.bias", 1, 1),),
            ),
            "'attention.o.bias': the model has no such parameter with a dimension 1",
        ),
        (
            Group(
                "o",
                "mha",
                4,
                (),
                (Member("attention.o", 6, "consumer"),),
                attributes=(Attribute("attentive", "num_heads", 1),),
            ),
            "attentive.num_heads: the model has no such integer attribute",
        ),
    ],
)
@pytest.mark.parametrize("verb", [mask_, slim_])
def test_a_plan_that_does_not_fit_changes_nothing(verb, group, message):
    block = make_block()
    before, text = copy.deepcopy(block.state_dict()), repr(block)
    with pytest.raises(SurgeryError, match=message):
        verb(block, _plan(group))
    assert repr(block) == text
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("verb", [mask_, slim_])
def test_a_tied_weight_is_refused(verb):
    block = make_block()
    block.twin = nn.Linear(WIDTH, HIDDEN)
    block.twin.weight = block.fc2.weight
    before = block.twin.weight.clone()
    with pytest.raises(SurgeryError, match=r"'fc2.weight' is tied to 'twin.weight'"):
        verb(block, PLAN)
    assert torch.equal(block.twin.weight, before)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_repair_of_what_is_tied_is_refused(part):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    setattr(model[1], part, getattr(model[0], part))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(SurgeryError, match=rf"'1\.{part}' is tied to '0\.{part}'"):
        repair_(model, "1", torch.zeros(4, 4), torch.zeros(4))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
