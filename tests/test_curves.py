"""Error curves: what the model loses when one group alone gets narrower."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from calibration_cases import batches_of, encoder, prepared, texts, vectors
from tiny_models import FAMILIES, FFN, HEADS, mlp
from torch import Tensor, nn

from slimkern import discover, one_shot
from slimkern.budget import levels
from slimkern.calibration.batches import read_batches
from slimkern.calibration.store import Store
from slimkern.calibration.walk import Walk
from slimkern.copies import sharing_copy
from slimkern.curves import error_curves
from slimkern.layerwise import Method


def curves_of(model: nn.Module, raw: Any, method: Method | None = None) -> dict[str, Any]:
    batches = read_batches(model, raw)
    groups = [g for g in discover(model, batches[0].example) if not g.is_head]
    widths = {g.name: levels(g.num_units, 8 if g.kind == "ffn" else 1) for g in groups}
    with Store(0) as store:
        walk = Walk(model, sharing_copy(model), groups, batches, store, 10**6)
        found = error_curves(walk, model, widths, method or Method(), lambda *step: None)
        assert not store._files  # nothing is left waiting
    assert list(found) == list(dict.fromkeys(s.group.name for s in walk.sites)) or "mpnet" in str(
        type(model)
    )
    assert {name: set(curve) for name, curve in found.items()} == {
        name: set(kept) for name, kept in widths.items()
    }
    return found


@torch.no_grad()
def change(model: nn.Module, other: nn.Module, raw: Any) -> float:
    """``‖out - other out‖²`` of real tokens, relative to the variance of the first."""
    held, _ = prepared(model, raw)
    a, b = (torch.cat([x.real_outputs(x.call(m)).double() for x in held]) for m in (model, other))
    return float((a - b).square().sum() / (a - a.mean(0)).square().sum())


@pytest.mark.parametrize("name", ["bert", "distilbert", "mpnet", "torch"])
def test_less_width_loses_more(name):
    model = encoder(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for curve in curves_of(model, batches_of(name)).values():
        widths = sorted(curve, reverse=True)
        assert curve[widths[0]] == 0
        assert all(curve[wide] <= curve[narrow] for wide, narrow in pairwise(widths))
        assert curve[widths[-1]] > 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "repair"), [("bert", "least_squares"), ("bert", "none"), ("mpnet", "least_squares")]
)
def test_at_half_the_width_it_is_what_really_happens(name, repair):
    """The group alone, slimmed and repaired: the change of the model's outputs. (Each layer by
    itself, where several share their heads.)"""
    model, raw = encoder(name, torch.float64), batches_of(name)
    for group, curve in curves_of(model, raw, Method(repair=repair, chunk=1)).items():
        kind = "ffn2_sparsity" if FFN in curve else "mha_sparsity"
        kept = FFN // 2 if FFN in curve else HEADS // 2
        options = {"op_names": [group], "round_multiplier": 8, "repair": repair, "chunk": 1}
        small = one_shot(model, raw, sequential=False, **options, **{kind: 0.5})
        assert [len(e.keep) for e in small.plan] == [kept]
        assert curve[kept] == pytest.approx(change(model, small.model, raw), rel=1e-6)


@pytest.mark.parametrize(
    "task", ["ForQuestionAnswering", "ForSequenceClassification", "ForMaskedLM"]
)
def test_any_outputs(task):
    """One number per token of batches of several lengths, a pooled output, a wide one."""
    found = curves_of(FAMILIES["bert"](task), texts())
    assert all(max(curve.values()) > 0 for curve in found.values())


def test_vectors():
    found = curves_of(mlp(10, 24, 20, 16, 5), vectors())
    assert list(found) == ["2", "4"]


def test_a_group_that_cannot_be_cut_has_one_width():
    model = mlp(10, 8, 20, 5)
    assert curves_of(model, vectors())["2"] == {8: 0.0}


def test_a_layer_that_says_nothing_costs_nothing():
    model = FAMILIES["bert"]()
    model.encoder.layer[1].output.dense.weight.data.zero_()
    found = curves_of(model, texts())
    assert set(found["encoder.layer.1.output.dense"].values()) == {0.0}


def test_outputs_without_numbers():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.out = mlp(10, 24, 10), nn.Linear(10, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.body(x))).argmax(-1)

    with pytest.raises(ValueError, match="no floating-point tensor"):
        curves_of(Counts(), vectors())
