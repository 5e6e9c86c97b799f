"""One-shot slimming of whole models: what is solved, what it costs, what comes back."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from calibration_cases import ENCODERS, batches_of, blocks, encoder, prepared, texts, vectors, whole
from tiny_models import FAMILIES, FFN, HEAD_DIM, HEADS, mlp
from torch import Tensor, nn

import slimkern
from slimkern import one_shot
from slimkern.copies import sharing_copy
from slimkern.cuts import spread
from slimkern.selection import kept_units

EPS = torch.finfo(torch.float64).eps


def plus(model: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return x + h


@functools.cache
def slimmed(name: str, **options: Any) -> tuple[nn.Module, Any, Any]:
    """The dense model in fp64, its batches, and the result at about half; made once."""
    model, batches = encoder(name, torch.float64), batches_of(name)
    heads = {} if name == "torch" else {"mha_sparsity": 0.5}
    settings = {"ffn2_sparsity": 0.5, "round_multiplier": 4, **heads, **options}
    return model, batches, one_shot(model, batches, **settings)


@torch.no_grad()
def outputs(model: nn.Module, batches: Any) -> Tensor:
    """Of real tokens."""
    held, _ = prepared(model, batches)
    return torch.cat([batch.real_outputs(batch.call(model)) for batch in held])


@pytest.mark.parametrize("name", ENCODERS)
def test_errors_are_what_the_slim_model_misses(name):
    """Of each group: in the sum behind its layers, as a part of the variance that is aimed at."""
    model, batches, result = slimmed(name)
    held, sites = prepared(model, batches)
    dense, slim = whole(model, held, sites), whole(result.model, held, sites)
    for entry in result.plan:
        errors = []
        for member in entry.group.consumers:
            keys = [(member.name, index) for index in range(len(held))]
            wanted = [held[i].real(dense[key][2]) for i, key in enumerate(keys)]
            got = [held[i].real(slim[key][2]) for i, key in enumerate(keys)]
            residual = [held[i].real(slim[k][2] - slim[k][1]) for i, k in enumerate(keys)]
            aim = torch.cat(wanted) - torch.cat(residual)
            missed = (torch.cat(got) - torch.cat(wanted)).square().sum()
            errors.append(float(missed / (aim - aim.mean(0)).square().sum()))
        assert entry.error == pytest.approx(sum(errors) / len(errors), rel=1e-6), entry.group.name
        assert 0 < entry.error < 1


@pytest.mark.parametrize("name", ENCODERS)
def test_the_slim_model_is_its_masked_twin(name):
    """The repaired weights, put back into the dense model and masked, compute the same."""
    model, batches, result = slimmed(name)
    twin = copy.deepcopy(model)
    for entry in result.plan:
        for member in entry.group.consumers:
            big, small = (m.get_submodule(member.name) for m in (twin, result.model))
            kept = spread(torch.tensor(entry.keep), member.unit_size)
            big.weight.data[:, kept] = small.weight.data
            big.bias.data.copy_(small.bias.data)
    slimkern.mask_(twin, result.plan)
    masked, slim = outputs(twin, batches), outputs(result.model, batches)
    assert (slim - masked).abs().max() <= 1e4 * EPS * masked.abs().max()
    assert (slim - outputs(model, batches)).abs().max() > 1e-6


def test_the_first_layer_is_lstsq_by_hand():
    model, batches, result = slimmed("bert", ridge=1e-2)
    held, sites = prepared(model, batches)
    entry = next(iter(result.plan))
    seen = whole(model, held, sites)
    kept = spread(torch.tensor(entry.keep), HEAD_DIM)
    x = torch.cat([held[i].real(seen[sites[0], i][0]) for i in range(len(held))])[:, kept]
    y = torch.cat([held[i].real(seen[sites[0], i][1]) for i in range(len(held))])
    before = model.get_submodule(sites[0]).weight.detach()[:, kept]
    rows = (len(x) * 1e-2 * float((x - x.mean(0)).square().mean())) ** 0.5
    ones, ridge = torch.ones(len(x), 1).double(), rows * torch.eye(len(kept), dtype=torch.float64)
    ridge = nn.functional.pad(ridge, (0, 1))
    inputs = torch.cat([torch.cat([x, ones], 1), ridge])
    found = torch.linalg.lstsq(inputs, torch.cat([y, rows * before.T]), driver="gelsd").solution
    linear = result.model.get_submodule(sites[0])
    bound = 100 * len(kept) / 1e-2 * EPS  # the condition number of the normal equations
    assert torch.allclose(
        linear.weight, found[:-1].T, rtol=0, atol=bound * float(found.abs().max())
    )
    assert torch.allclose(linear.bias, found[-1], rtol=0, atol=bound * float(found.abs().max()))


@pytest.mark.parametrize("name", ["bert", "mpnet", "torch"])
def test_repairs_help(name):
    """Least squares more than the bias alone, and that more than nothing, in the final outputs."""
    off = []
    for options in ({}, {"repair": "bias"}, {"repair": "none"}):
        model, batches, result = slimmed(name, **options)
        off.append(float((outputs(result.model, batches) - outputs(model, batches)).norm()))
    assert off[0] < off[1] < off[2], off


@pytest.mark.parametrize("name", ["bert", "torch"])
def test_layers_that_see_the_slim_ones_make_up_for_them(name):
    off = []
    for options in ({}, {"sequential": False}):
        model, batches, result = slimmed(name, **options)
        off.append(float((outputs(result.model, batches) - outputs(model, batches)).norm()))
    assert off[0] <= off[1], off


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_keeping_everything_changes_nothing(dtype):
    model = FAMILIES["bert"](dtype=dtype)
    result = one_shot(model, texts(), ffn2_sparsity=0.5, round_multiplier=FFN)
    assert torch.equal(outputs(result.model, texts()), outputs(model, texts()))
    assert [e.error for e in result.plan] == [0.0] * 3
    assert all("cancels the cut" in note for note in result.plan.notes)
    assert len(result.plan.notes) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    model = FAMILIES["bert"](dtype=dtype)
    result = one_shot(model, texts(), 0.3, 0.25, round_multiplier=4)
    assert all(p.dtype == dtype for p in result.model.parameters())
    found = outputs(result.model, texts()).float()
    assert found.isfinite().all()
    nothing = one_shot(model, texts(), 0.3, 0.25, round_multiplier=4, repair="none").model
    wanted = outputs(model, texts()).float()
    assert (found - wanted).norm() < (outputs(nothing, texts()).float() - wanted).norm()


@pytest.mark.parametrize("criterion", ["obs", "magnitude", "activation", "fluctuation", "fisher"])
def test_criteria(criterion):
    """All keep the same number of units; runs are repeatable to the bit."""
    model = FAMILIES["bert"]()
    one = one_shot(model, texts(), 0.5, 0.5, criterion=criterion, round_multiplier=8)
    two = one_shot(model, texts(), 0.5, 0.5, criterion=criterion, round_multiplier=8)
    assert one.plan == two.plan
    for a, b in zip(one.model.parameters(), two.model.parameters()):
        assert torch.equal(a, b)
    assert [len(e.keep) for e in one.plan] == [HEADS // 2, FFN // 2] * 3


@pytest.mark.parametrize(
    ("sparsity", "multiple"), [(0.5, 32), (0.3, 8), (0.99, 32), (0.99, 1), (0.01, 1)]
)
def test_widths_are_those_asked_for(sparsity, multiple):
    model = FAMILIES["bert"]()
    result = one_shot(model, texts(), sparsity, sparsity, round_multiplier=multiple)
    for entry in result.plan:
        ffn = entry.group.kind == "ffn"
        units = kept_units(FFN if ffn else HEADS, sparsity, multiple if ffn else 1)
        assert len(entry.keep) == units
        linear = result.model.get_submodule(entry.group.consumers[0].name)
        assert tuple(linear.weight.shape)[1] == units * entry.group.consumers[0].unit_size
        assert linear.in_features == linear.weight.shape[1]


def test_op_names_choose_layers():
    model = FAMILIES["bert"]()
    names = ["encoder.layer.1"]
    plan = one_shot(model, texts(), 0.5, 0.5, round_multiplier=8, op_names=names).plan
    assert [e.group.name for e in plan] == [
        "encoder.layer.1.attention.output.dense",
        "encoder.layer.1.output.dense",
    ]
    plan = one_shot(
        model, texts(), 0.5, round_multiplier=8, excluded_op_names=["encoder.layer.1", "nothing"]
    ).plan
    assert [e.group.name for e in plan] == [
        "encoder.layer.0.output.dense",
        "encoder.layer.2.output.dense",
    ]
    assert plan.notes[0] == "excluded_op_names: 'nothing' is the name of no module"


def test_joint_heads():
    """MPNet's layers share their position bias, so that the same heads go from all of them."""
    _, _, result = slimmed("mpnet")
    (entry,) = (e for e in result.plan if e.group.kind == "mha")
    assert len(entry.group.consumers) == 3
    assert len(entry.keep) == HEADS // 2
    assert result.model.encoder.relative_attention_bias.weight.shape[1] == HEADS // 2
    for layer in result.model.encoder.layer:
        assert layer.attention.attn.num_attention_heads == HEADS // 2


@pytest.mark.parametrize("sequential", [True, False])
def test_stacks_of_linears(sequential):
    """Each is the second of one group and the first of the next."""
    model, raw = mlp(10, 24, 20, 16, 5).double(), vectors()
    result = one_shot(model, raw, 0.25, round_multiplier=1, sequential=sequential)
    assert [tuple(m.weight.shape) for m in result.model if isinstance(m, nn.Linear)] == [
        (18, 10), (15, 18), (16, 15), (5, 16),
    ]  # fmt: skip
    crude = one_shot(model, raw, 0.25, round_multiplier=1, repair="none")
    wanted = outputs(model, raw)
    assert (outputs(result.model, raw) - wanted).norm() < (
        outputs(crude.model, raw) - wanted
    ).norm()


@pytest.mark.parametrize("ones_row", [True, False])
@pytest.mark.parametrize("add_bias", [True, False])
def test_biases(ones_row, add_bias):
    """A bias is solved for where there is one, and added where there is none if that is wanted."""
    model = blocks(plus).double()
    model.second[1].bias = None
    model.norms[1].weight.data += 1
    result = one_shot(
        model, vectors(), 0.5, round_multiplier=4, ones_row=ones_row, add_bias=add_bias
    )
    first, second = result.model.second[0], result.model.second[1]
    assert torch.equal(first.bias, model.second[0].bias) != ones_row
    assert (second.bias is not None) == add_bias
    crude = one_shot(model, vectors(), 0.5, round_multiplier=4, repair="none")
    assert all(a.error < b.error for a, b in zip(result.plan, crude.plan))


def test_hooks_of_the_user_run_once():
    model = blocks(plus).double()
    model.second[1].register_forward_hook(lambda m, args, output: 1.5 * output)
    kept = one_shot(model, vectors(), 0.5, round_multiplier=24, op_names=["second.[12]"])
    assert torch.equal(outputs(kept.model, vectors()), outputs(model, vectors()))
    cut = one_shot(model, vectors(), 0.5, round_multiplier=4)
    crude = one_shot(model, vectors(), 0.5, round_multiplier=4, repair="none")
    off = [(outputs(m.model, vectors()) - outputs(model, vectors())).norm() for m in (cut, crude)]
    assert off[0] < off[1]


def test_a_sharing_copy_costs_nothing():
    model = FAMILIES["bert"]()
    other = sharing_copy(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters()))
    assert other.config is not model.config
