"""Selection under a target, rounding, floors, ties; plans as JSON."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimkern.discovery.groups import Attribute, Between, Group, Member
from slimkern.plan import PlanEntry, SlimPlan, compose, make_plan, plan_from_zeros, within
from slimkern.selection import round_width, select


def _group(name: str = "fc2", n: int = 8, kind: str = "ffn", size: int = 1) -> Group:
    return Group(
        name,
        kind,  # type: ignore[arg-type]
        n,
        producers=(Member(f"{name}.in", size, "producer"),),
        consumers=(Member(name, size, "consumer"),),
    )


def test_local_selection_removes_exactly_the_lowest():
    scores = {"a": torch.tensor([3.0, 1, 2, 0]), "b": torch.tensor([0.1, 0.2, 0.3, 0.4])}
    keep, notes = select(scores, 0.5)
    assert keep == {"a": (0, 2), "b": (2, 3)}
    assert notes == ()


def test_global_selection_ranks_all_groups_together_and_leaves_one_unit():
    scores = {"weak": torch.tensor([0.1, 0.2, 0.3]), "strong": torch.tensor([7.0, 8, 9])}
    keep, _ = select(scores, 0.5, scope="global")
    assert keep == {"weak": (2,), "strong": (1, 2)}


def test_floors_that_make_a_target_unreachable_are_reported():
    keep, notes = select({"a": torch.arange(4.0), "b": torch.arange(4.0)}, 0.9, scope="global")
    assert [len(k) for k in keep.values()] == [1, 1]
    assert notes == ("floors and limits allow 6 of 7 units to go",)


def test_minimum_and_maximum_sparsity_per_group():
    scores = {"weak": torch.linspace(0, 1, 10), "strong": torch.linspace(5, 6, 10)}
    keep, _ = select(scores, 0.5, scope="global", min_sparsity=0.4, max_sparsity=0.6)
    assert {n: 10 - len(k) for n, k in keep.items()} == {"weak": 6, "strong": 4}


@pytest.mark.parametrize("scope", ["local", "global"])
def test_ties_are_cut_to_exactly_k(scope):
    keep, _ = select({"a": torch.ones(10)}, 0.3, scope=scope)
    assert keep["a"] == (3, 4, 5, 6, 7, 8, 9)


def test_a_target_that_is_a_whole_number_is_met():
    keep, _ = select({"a": torch.arange(100.0)}, 0.29)  # 0.29 * 100 < 29 in binary
    assert len(keep["a"]) == 71


def test_width_is_rounded_up_to_the_multiple_with_the_best_of_the_removed():
    keep, notes = select({"a": torch.arange(1536.0)}, 0.8, multiple_of=32)
    assert keep["a"] == tuple(range(1216, 1536))
    assert notes == ()


def test_rounding_that_cancels_a_cut_is_reported():
    keep, notes = select({"a": torch.arange(20.0)}, 0.5, multiple_of=32)
    assert len(keep["a"]) == 20
    assert len(notes) == 1
    assert "a: rounding 10 of 20" in notes[0]


@given(st.integers(1, 300), st.integers(1, 64), st.floats(0, 0.999), st.integers(0, 5))
def test_selection_keeps_a_rounded_width_of_the_best(n, multiple, sparsity, seed):
    scores = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    keep, _ = select({"a": scores}, sparsity, multiple_of=multiple)
    kept = list(keep["a"])
    removed = sorted(set(range(n)) - set(kept))
    assert len(kept) % multiple == 0 or len(kept) == n
    assert len(kept) >= max(1, n - int(sparsity * n + 1e-9))
    assert len(kept) == round_width(max(1, n - int(sparsity * n + 1e-9)), multiple, n)
    if removed:
        assert scores[removed].max() <= scores[kept].min()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must lie in"),
        ({"sparsity": -0.1}, "sparsity must lie in"),
        ({"scope": "layer"}, "scope must be one of"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"min_units": 0}, "min_units"),
        ({"scores": {"a": torch.tensor([1.0, float("nan")])}}, "'a' hold NaN: 1"),
        ({"scores": {"a": torch.ones(2, 2)}}, "must be 1-D"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"scores": {"a": torch.ones(4)}, "sparsity": 0.5} | change
    with pytest.raises(ValueError, match=message):
        select(**arguments)


def test_make_plan_rounds_channels_and_not_heads():
    groups = [_group("f", 96), _group("h", 12, "mha", 4)]
    scores = {"f": torch.arange(96.0), "h": torch.arange(12.0)}
    plan = make_plan(groups, scores, ffn_sparsity=0.5, mha_sparsity=0.6)
    assert len(plan["f"].keep) == 64
    assert plan["h"].keep == (7, 8, 9, 10, 11)
    with pytest.raises(KeyError, match="other"):
        make_plan(groups, {"other": torch.ones(3)})
    with pytest.raises(ValueError, match=r"'f' have shape \(3,\), expected \(96,\)"):
        make_plan(groups, {"f": torch.ones(3)})


def test_plan_survives_json_and_the_text_is_stable():
    group = Group(
        "o",
        "mha",
        4,
        producers=(Member("q", 8, "query"),),
        consumers=(Member("o", 8, "consumer"),),
        between=(Between("bias.weight", 1, 1),),
    )
    plan = SlimPlan((PlanEntry(group, (0, 3)),), ("a note",))
    text = plan.to_json()
    assert SlimPlan.from_json(text) == plan
    assert SlimPlan.from_json(text).to_json() == text


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"format": "other", "version": 1}', '{"format": "slimkern-plan"}'],
)
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(ValueError, match="plan"):
        SlimPlan.from_json(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("kind", "conv"), ("num_units", True), ("num_units", 0), ("name", 7), ("is_head", 1)),
        *(("producers", {}), ("keep", [0, 1.5]), ("keep", "01"), ("attributes", None)),
        ("consumers", [{"name": "o", "role": "consumer", "unit_size": "8"}]),
        ("attributes", [{"module": "", "name": "heads", "per_unit": -1}]),
        ("between", [{"name": "bias", "dim": -1, "unit_size": 1}]),
    ],
)
def test_a_damaged_value_is_refused_with_its_name(field, value):
    data = json.loads(SlimPlan((PlanEntry(_group(), (0, 3)),)).to_json())
    data["groups"][0][field] = value
    with pytest.raises(ValueError, match=r"not a slimkern plan: [a-z_]+ is "):
        SlimPlan.from_json(json.dumps(data))


@pytest.mark.parametrize("keep", [(), (1, 0), (0, 0), (-1,), (8,)])
def test_an_entry_with_bad_indices_is_refused(keep):
    with pytest.raises(ValueError, match="fc2"):
        PlanEntry(_group(), keep)


def test_compose_speaks_of_the_original_layer():
    big, small = _group(n=8), _group(n=4)
    both = compose(SlimPlan((PlanEntry(big, (0, 2, 4, 6)),)), SlimPlan((PlanEntry(small, (1, 3)),)))
    assert both["fc2"].keep == (2, 6)
    assert both["fc2"].group == big
    with pytest.raises(ValueError, match="'fc2': one plan leaves 2 units, the next speaks of 4"):
        compose(both, SlimPlan((PlanEntry(small, (1, 3)),)))


def test_a_plan_has_other_names_within_a_model_that_contains_its_own():
    group = Group(
        "o", "mha", 4, (Member("a.q", 8, "query"),), (Member("o", 8, "consumer"),),
        (Between("bias", 1, 1),), (Attribute("", "heads", 1), Attribute("a", "heads", 1)),
    )  # fmt: skip
    plan = SlimPlan((PlanEntry(group, (0, 3)),), ("a note",))
    assert within(plan, "") == plan
    moved = within(plan, "inner")
    assert moved.notes == plan.notes
    assert moved["inner.o"].keep == (0, 3)
    inner = moved["inner.o"].group
    assert [m.name for m in (*inner.producers, *inner.consumers)] == ["inner.a.q", "inner.o"]
    assert inner.between[0].name == "inner.bias"
    assert [a.module for a in inner.attributes] == ["inner", "inner.a"]


def test_zeros_make_a_plan_and_dead_units_of_lowest_index_fill_the_multiple():
    model = torch.nn.ModuleDict({"fc2": torch.nn.Linear(8, 3)})
    with torch.no_grad():
        model["fc2"].weight[:, [1, 3, 4, 6, 7]] = 0
    assert plan_from_zeros(model, [_group()], multiple_of=4)["fc2"].keep == (0, 1, 2, 5)
    assert plan_from_zeros(model, [_group()], multiple_of=1)["fc2"].keep == (0, 2, 5)
    cancelled = plan_from_zeros(model, [_group()], multiple_of=32)
    assert cancelled["fc2"].keep == tuple(range(8))
    assert "cancels" in cancelled.notes[0]
    with torch.no_grad():
        model["fc2"].weight.zero_()
    assert plan_from_zeros(model, [_group()], multiple_of=1)["fc2"].keep == (0,)
