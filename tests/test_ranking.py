"""Criteria to compare OBS with: their definitions in plain sums, and gradients of masks."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import FAMILIES, Between, mlp, text_inputs
from torch import nn

from slimkern.calibration.batches import Batch, read_batches
from slimkern.calibration.moments import Moments
from slimkern.calibration.ranking import STATISTICS, mask_fisher, unit_scores
from slimkern.discovery import discover
from slimkern.discovery.groups import Group, Member
from slimkern.discovery.inputs import prepare
from slimkern.plan import PlanEntry, SlimPlan
from slimkern.surgery import mask_

EPS = torch.finfo(torch.float64).eps


@pytest.mark.parametrize("unit_size", [1, 3])
def test_scores_are_their_definitions(unit_size):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 12, generator=generator, dtype=torch.float64) + 3
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    moments = Moments(12)
    for part in x.split(20):
        moments.update(part)
    deviations = x - x.mean(0)
    expected = {
        "magnitude": [weight[:, c].norm() for c in units(12, unit_size)],
        "activation": [
            sum(weight[:, j].abs().mean() * x[:, j].norm() for j in c) for c in units(12, unit_size)
        ],
        "fluctuation": [
            sum(deviations[:, j].square().mean() * weight[:, j].square().sum() for j in c)
            for c in units(12, unit_size)
        ],
    }
    assert set(expected) == set(STATISTICS)
    for criterion, wanted in expected.items():
        found = unit_scores(criterion, weight, moments, unit_size)
        # Second moments about the mean are differences: 10 = (mean / deviation)² scales rounding.
        bound = 10 * len(x) * EPS * max(wanted)
        torch.testing.assert_close(found, torch.stack(wanted), rtol=0, atol=float(bound))


def units(n, size):
    return [list(range(start, start + size)) for start in range(0, n, size)]


def test_a_constant_channel_does_not_fluctuate_but_is_active():
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 7.0
    moments = Moments(4)
    moments.update(x)
    weight = torch.ones(3, 4)
    # The mean of 40 equal fp32 numbers may be off by their rounding, and enters squared.
    assert unit_scores("fluctuation", weight, moments, 1)[1] <= 3 * (40 * 7.0 * 2**-24) ** 2
    assert unit_scores("activation", weight, moments, 1).argmax() == 1


def test_scores_refuse_what_they_can_not_take():
    moments = Moments(4)
    with pytest.raises(ValueError, match="one of magnitude, activation, fluctuation, got 'obs'"):
        unit_scores("obs", torch.ones(3, 4), moments, 1)
    with pytest.raises(ValueError, match="no token was seen"):
        unit_scores("activation", torch.ones(3, 4), moments, 1)
    with pytest.raises(ValueError, match="do not fit"):
        unit_scores("magnitude", torch.ones(3, 6), moments, 1)
    with pytest.raises(ValueError, match="do not fit"):
        unit_scores("magnitude", torch.ones(3, 4), moments, 3)
    with pytest.raises(ValueError, match="not finite"):
        unit_scores("magnitude", torch.full((3, 4), float("nan")), moments, 1)
    assert unit_scores("magnitude", torch.ones(4, 4), moments, 2).tolist() == [8**0.5] * 2


def real_loss(outputs, batch):
    return batch.real(outputs[0]).square().sum().sin()


def text_batches(model, count=2):
    return read_batches(model, [text_inputs(seed=seed) for seed in range(count)])


def explicit_slopes(model, groups, batch, loss):
    """``dL/dm`` with masks that are there: parameters that multiply the inputs of real tokens."""
    masks = {
        g.name: torch.ones(g.num_units, dtype=torch.float64, requires_grad=True) for g in groups
    }
    handles = []
    for group in groups:
        for member in group.consumers:

            def hook(module, args, mask=masks[group.name], size=member.unit_size):
                factors = mask.repeat_interleave(size).expand_as(args[0])
                if batch.mask is not None:
                    factors = torch.where(batch.mask[..., None], factors, torch.ones_like(factors))
                return (args[0] * factors,)

            handles.append(model.get_submodule(member.name).register_forward_pre_hook(hook))
    loss(batch.call(model), batch).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return {name: mask.grad for name, mask in masks.items()}


@pytest.mark.parametrize("family", ["bert", "mpnet", "distilbert"])
def test_fisher_is_autograd_with_explicit_masks(family):
    model = FAMILIES[family](dtype=torch.float64)
    groups = discover(model).groups
    batches = text_batches(model)
    expected = {g.name: torch.zeros(g.num_units, dtype=torch.float64) for g in groups}
    for batch in batches:
        for name, slope in explicit_slopes(model, groups, batch, real_loss).items():
            expected[name] += slope.square()
    found = mask_fisher(model, groups, batches, real_loss)
    assert set(found) == set(expected)
    if family == "mpnet":
        assert any(len(g.consumers) > 1 for g in groups), "one with joint units"
    for name, scores in found.items():
        assert (scores > 0).any(), name
        # The same products in another order, through some hundred operations.
        assert (scores - expected[name]).abs().max() <= 1e4 * EPS * expected[name].max(), name


def test_fisher_is_finite_differences_of_scaled_columns():
    model = FAMILIES["bert"](dtype=torch.float64)
    groups = discover(model).groups
    (batch,) = text_batches(model, 1)
    found = mask_fisher(model, groups, [batch], real_loss)
    step = 1e-5

    def value(member, unit, factor):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            weight = changed.get_submodule(member.name).weight
            weight[:, unit * member.unit_size : (unit + 1) * member.unit_size] *= factor
            return float(real_loss(batch.call(changed), batch))

    for group in (groups[0], groups[1], groups[-1]):
        (member,) = group.consumers
        for unit in range(0, group.num_units, 17):
            slope = (value(member, unit, 1 + step) - value(member, unit, 1 - step)) / (2 * step)
            # Rounding of a value of size 1 after some hundred operations over the step, and the
            # third derivative, at the scale of the cube of the largest slope.
            largest = float(found[group.name].max()) ** 0.5
            bound = 1e3 * EPS / step + step**2 * max(1.0, largest) ** 3
            assert abs(slope**2 - float(found[group.name][unit])) <= 2 * bound * (largest + bound)


def test_fisher_leaves_padding_out_and_counts_a_reader_once():
    class TwoReaders(nn.Module):
        """Two second linears read the very same tensor."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Linear(6, 8)
            self.a, self.b = nn.Linear(8, 6), nn.Linear(8, 6)

        def forward(self, x):
            h = torch.tanh(self.first(x))
            return self.a(h) * self.b(h)

    model = TwoReaders().double()
    readers = tuple(Member(n, 1, "consumer") for n in "ab")
    group = Group("a", "ffn", 8, (Member("first", 1, "producer"),), readers)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = Batch(prepare(model, x), mask)

    def everything(outputs, batch):
        return outputs.square().sum()

    wanted = explicit_slopes(model, [group], batch, everything)["a"].square()
    found = mask_fisher(model, [group], [batch], everything)["a"]
    assert (found - wanted).abs().max() <= 1e3 * EPS * wanted.max()
    whole = mask_fisher(model, [group], [Batch(batch.inputs, None)], everything)["a"]
    assert not torch.allclose(found, whole, rtol=1e-3), "padding would have counted"


def test_without_a_loss_it_estimates_the_change_of_the_outputs():
    """Over many draws of signs the mean is the diagonal of JᵀJ."""
    model = mlp(5, 6, 3).double()
    (group,) = [g for g in discover(model, torch.zeros(2, 5)) if g.name == "2"]
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (batch,) = read_batches(model, [x])
    hidden = model[1](model[0](x))
    exact = (hidden[:, None, :] * model[2].weight).square().sum((0, 1)).detach()
    draws = torch.stack([mask_fisher(model, [group], [batch], seed=s)["2"] for s in range(400)])
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - exact).abs() <= 5 * error).all(), "five standard errors"
    again = mask_fisher(model, [group], [batch], seed=7)["2"]
    assert torch.equal(again, draws[7])
    assert not torch.equal(again, draws[8])


def test_fisher_leaves_the_model_as_it_was():
    model = FAMILIES["bert"]("ForSequenceClassification").train()
    model.bert.pooler.eval()
    groups = [g for g in discover(model).groups if not g.is_head]
    batches = text_batches(model)
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 3 > 0)
        parameter.grad = torch.full_like(parameter, float(i)) if i % 3 == 1 else None
    before = {n: p.detach().clone() for n, p in model.state_dict().items()}
    told = []
    first = mask_fisher(model, groups, batches, progress=lambda *a: told.append(a))
    assert told == [("fisher", 1, 2), ("fisher", 2, 2)]
    for i, parameter in enumerate(model.parameters()):
        assert parameter.requires_grad == (i % 3 > 0)
        assert (parameter.grad is None) == (i % 3 != 1)
        assert parameter.grad is None or bool((parameter.grad == i).all())
    assert model.training
    assert not model.bert.pooler.training
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    frozen = mask_fisher(model.eval(), groups, batches)
    assert all(torch.equal(first[n], frozen[n]) for n in first), "no dropout, frozen or not"


def test_fisher_refuses_what_it_can_not_score():
    model = FAMILIES["bert"]()
    groups = discover(model).groups
    batches = text_batches(model)
    with pytest.raises(ValueError, match="holds no batch"):
        mask_fisher(model, groups, [])
    with pytest.raises(ValueError, match=r"scalar that depends .* got shape \(3, 9, 48\)"):
        mask_fisher(model, groups, batches, lambda outputs, batch: outputs[0])
    with pytest.raises(ValueError, match="requires_grad=False"):
        mask_fisher(model, groups, batches, lambda outputs, batch: outputs[0].detach().sum())
    with torch.no_grad():
        model.get_parameter("encoder.layer.1.intermediate.dense.bias")[3] = float("nan")
    with pytest.raises(ValueError, match=r"'encoder.layer.1.output.dense': .* NaN or infinite"):
        mask_fisher(model, groups[2:4], batches)
    masked = FAMILIES["bert"]()
    mask_(masked, SlimPlan((PlanEntry(groups[1], (0, 2, 3)),)))
    with pytest.raises(ValueError, match="score the dense model"):
        mask_fisher(masked, groups, batches)
    assert set(mask_fisher(masked, [groups[0]], batches)) == {groups[0].name}
    idle = Between(lambda self, x, _: torch.relu(x), idle=nn.Linear(24, 3))
    group = Group(
        "idle", "ffn", 24, (Member("first", 1, "producer"),), (Member("idle", 1, "consumer"),)
    )
    with pytest.raises(ValueError, match=r"'idle' .* is not reached"):
        mask_fisher(idle, [group], read_batches(idle, [torch.randn(2, 10)]))
