"""The theorem on plain modules: masked = slim; nothing else changes; refusals change nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from slimkern.cuts import SurgeryError
from slimkern.discovery import discover
from slimkern.discovery.groups import Attribute, Between, Group, Member
from slimkern.masks import carried_masks, is_masked, masked_beside, masked_plan
from slimkern.nn import MaskedLinear
from slimkern.plan import PlanEntry, SlimPlan
from slimkern.surgery import (
    mask_,
    slim_,
    unmasked,
)
from tests.tiny_models import FAMILIES

HEADS, HEAD_DIM, HIDDEN, WIDTH = 4, 6, 10, 17


class Attention(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.num_heads, self.all_head_size = HEADS, HEADS * HEAD_DIM
        self.q = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=bias)
        self.k = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=bias)
        self.v = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=bias)
        self.o = nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=bias)

    def forward(self, x):
        b, s, _ = x.shape
        q, k, v = (
            p(x).view(b, s, self.num_heads, HEAD_DIM).transpose(1, 2)
            for p in (self.q, self.k, self.v)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(b, s, self.all_head_size))


class Block(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.attention = Attention(bias)
        self.fc1 = nn.Linear(HIDDEN, WIDTH, bias=bias)
        self.fc2 = nn.Linear(WIDTH, HIDDEN, bias=bias)

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.fc2(torch.nn.functional.gelu(self.fc1(x)))


FFN = Group("fc2", "ffn", WIDTH, (Member("fc1", 1, "producer"),), (Member("fc2", 1, "consumer"),))
MHA = Group(
    "attention.o",
    "mha",
    HEADS,
    tuple(
        Member(f"attention.{n}", HEAD_DIM, r)
        for n, r in (("q", "query"), ("k", "key"), ("v", "value"))
    ),
    (Member("attention.o", HEAD_DIM, "consumer"),),
    attributes=(
        Attribute("attention", "num_heads", 1),
        Attribute("attention", "all_head_size", HEAD_DIM),
    ),
)
PLAN = SlimPlan((PlanEntry(FFN, (0, 3, 4, 9, 16)), PlanEntry(MHA, (1, 3))))


def _block(dtype=torch.float32, bias=True) -> Block:
    torch.manual_seed(0)
    return Block(bias).to(dtype).eval()


def _inputs(dtype=torch.float32):
    return torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)


def _assert_equal_to_rounding(a, b, like):
    """Two orders of summing the same products differ by at most the rounding of the longest sum."""
    scale = like.abs().max()
    steps = max(HIDDEN, WIDTH, HEADS * HEAD_DIM)
    assert (a - b).abs().max() <= 4 * steps * torch.finfo(a.dtype).eps * scale


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_masked_equals_zeroed_dense_equals_slim(dtype, bias):
    dense, masked, slim = (_block(dtype, bias) for _ in range(3))
    x = _inputs(dtype)
    with torch.no_grad():
        dead = [i for i in range(WIDTH) if i not in (0, 3, 4, 9, 16)]
        dense.fc2.weight[:, dead] = 0
        heads = dense.attention.o.weight.view(HIDDEN, HEADS, HEAD_DIM)
        heads[:, [0, 2]] = 0
    mask_(masked, PLAN)
    slim_(slim, PLAN)
    want, by_mask, by_cut = dense(x), masked(x), slim(x)
    _assert_equal_to_rounding(by_mask, want, want)
    _assert_equal_to_rounding(by_cut, want, want)
    assert torch.equal(masked.fc2.weight, dense.fc2.weight)
    assert torch.equal(masked.attention.o.weight, dense.attention.o.weight)


def test_masked_model_that_is_slimmed_equals_the_dense_one_that_is_slimmed():
    masked, slim = _block(), slim_(_block(), PLAN)
    slim_(mask_(masked, PLAN), PLAN)
    assert [type(m) for m in masked.modules()] == [type(m) for m in slim.modules()]
    for (name, a), (_, b) in zip(masked.state_dict().items(), slim.state_dict().items()):
        assert torch.equal(a, b), name
    assert not is_masked(masked)
    assert repr(masked) == repr(slim)


def test_sizes_counts_and_flags_after_the_cut():
    block = _block()
    block.fc1.weight.requires_grad_(False)
    slim_(block, PLAN)
    assert (block.fc1.out_features, block.fc2.in_features) == (5, 5)
    assert (block.attention.num_heads, block.attention.all_head_size) == (2, 2 * HEAD_DIM)
    assert tuple(block.attention.q.weight.shape) == (2 * HEAD_DIM, HIDDEN)
    assert not block.fc1.weight.requires_grad
    assert block.fc1.bias.requires_grad
    assert block.slim_plan == PLAN


def test_gradients_and_hooks_survive():
    block = _block()
    calls = []
    block.fc1.register_forward_hook(lambda *_: calls.append(1))
    block(_inputs()).sum().backward()
    grad = block.fc1.weight.grad.clone()
    slim_(block, PLAN)
    assert torch.equal(block.fc1.weight.grad, grad[[0, 3, 4, 9, 16]])
    block(_inputs())
    assert len(calls) == 2


def test_masks_can_be_moved_and_lifted():
    block, x = _block(), _inputs()
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
        _assert_equal_to_rounding(block(x), mask_(_block(), PLAN)(x), before)
        assert block.attention.num_heads == HEADS
    assert block.attention.num_heads == 2
    assert masked_plan(block, [FFN, MHA]) == PLAN
    mask_(block, full)
    assert type(block.fc1) is type(block.fc2) is nn.Linear
    assert not hasattr(block, "mask_plan")
    assert block.attention.num_heads == HEADS


def test_masks_are_told_from_inside_and_outside_and_forgotten_when_they_are_gone():
    outer = nn.Sequential(mask_(_block(), PLAN))
    names = {"0.fc2": (0, 3, 4, 9, 16), "0.attention.o": (1, 3)}
    assert {e.group.name: e.keep for e in carried_masks(outer)} == names
    assert masked_beside(outer, carried_masks(outer)) == []
    assert set(masked_beside(outer[0], SlimPlan(PLAN.entries[:1]))) == {
        f"attention.{n}" for n in "qkvo"
    }
    slim_(outer[0], PLAN)
    assert carried_masks(outer) == SlimPlan(())
    assert not hasattr(outer[0], "mask_plan")


@pytest.mark.parametrize("verb", [mask_, slim_])
def test_a_compiled_model_is_refused_with_a_word_on_the_module_inside(verb):
    block = _block()
    with pytest.raises(SurgeryError, match=r"model\._orig_mod"):
        verb(torch.compile(block, backend="eager"), PLAN)
    assert not is_masked(block)


def test_state_dict_of_a_masked_model_is_the_dense_one():
    block = mask_(_block(), PLAN)
    assert list(block.state_dict()) == list(_block().state_dict())
    reloaded = _block()
    reloaded.load_state_dict(block.state_dict())
    _assert_equal_to_rounding(reloaded(_inputs()), block(_inputs()), block(_inputs()))


def test_a_masked_model_can_be_copied():
    block = mask_(_block(), PLAN)
    other = copy.deepcopy(block)
    assert torch.equal(other(_inputs()), block(_inputs()))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_training_goes_on_with_the_carried_optimizer(optimizer):
    options = {"lr": 0.01} | ({"momentum": 0.9} if optimizer is torch.optim.SGD else {})
    masked, slim = mask_(_block(), PLAN), mask_(_block(), PLAN)
    opt_masked = optimizer(masked.parameters(), **options)
    opt_slim = optimizer(slim.parameters(), **options)

    def step(model, opt):
        opt.zero_grad()
        model(_inputs()).pow(2).mean().backward()
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
    assert slim(_inputs()).sub(want(_inputs())).abs().max() <= 1e-5


def test_an_optimizer_whose_state_cannot_be_cut_is_refused_before_anything_changes():
    block = _block()
    optimizer = torch.optim.Adafactor(block.parameters())
    block(_inputs()).sum().backward()
    optimizer.step()
    before = {n: p.clone() for n, p in block.named_parameters()}
    with pytest.raises(ValueError, match="Adafactor"):
        slim_(block, PLAN, optimizer=optimizer)
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter, before[name])


def test_an_optimizer_that_keeps_its_state_in_containers_is_refused():
    block = _block()
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    optimizer.state[block.fc2.weight]["blocks"] = [torch.zeros(3, 3)]
    with pytest.raises(ValueError, match="SGD: state 'blocks' is a list"):
        slim_(block, PLAN, optimizer=optimizer)
    assert block.fc1.out_features == WIDTH


def test_the_list_of_parameters_stays_the_one_that_an_optimizer_refers_to():
    block = _block()
    optimizer = torch.optim.LBFGS(block.parameters())
    slim_(block, PLAN, optimizer=optimizer)
    assert {id(p) for p in optimizer._params} == {id(p) for p in block.parameters()}


def test_an_optimizer_of_another_model_is_refused_before_anything_changes():
    block = _block()
    text = repr(block)
    with pytest.raises(ValueError, match="holds none of the model's parameters"):
        slim_(block, PLAN, optimizer=torch.optim.SGD(_block().parameters(), lr=1.0))
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
    block = _block()
    before, text = copy.deepcopy(block.state_dict()), repr(block)
    with pytest.raises(SurgeryError, match=message):
        verb(block, _plan(group))
    assert repr(block) == text
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("verb", [mask_, slim_])
def test_a_tied_weight_is_refused(verb):
    block = _block()
    block.twin = nn.Linear(WIDTH, HIDDEN)
    block.twin.weight = block.fc2.weight
    before = block.twin.weight.clone()
    with pytest.raises(SurgeryError, match=r"'fc2.weight' is tied to 'twin.weight'"):
        verb(block, PLAN)
    assert torch.equal(block.twin.weight, before)


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
    block = slim_(_block(), PLAN)
    again = Group("fc2", "ffn", 5, FFN.producers, FFN.consumers)
    slim_(block, SlimPlan((PlanEntry(again, (1, 4)),)))
    assert block.slim_plan["fc2"].keep == (3, 16)
    want = slim_(_block(), block.slim_plan)
    assert torch.equal(block(_inputs()), want(_inputs()))


def test_what_is_tied_and_cut_alike_stays_tied():
    model = nn.ModuleList([_block(), _block()])
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
    block = mask_(_block().to("meta"), PLAN)
    assert carried_masks(block) == PLAN
    moved = mask_(_block(), PLAN).to("meta")
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
