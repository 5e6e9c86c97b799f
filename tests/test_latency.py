"""The latency table: what it says of a known clock, what it shares, when it measures again."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latency_cases import WIDTHS, Clock, Forward, all_levels, refuse, straight
from tiny_models import FAMILIES, FFN, HEADS, LAYERS, mlp
from torch import nn

import slimkern
from slimkern import timing
from slimkern.latency import measure_latency, monotone
from slimkern.timing import Timing


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock(straight)
    monkeypatch.setattr(timing, "time_interleaved", made)
    return made


@pytest.fixture(scope="module")
def bert() -> tuple[nn.Module, tuple[slimkern.Group, ...]]:
    model = FAMILIES["bert"]()
    return model, slimkern.discover(model).groups


def test_a_table_says_what_a_known_clock_says(bert, clock, tmp_path):
    model, groups = bert
    seen: list[tuple[int, int]] = []
    costs = measure_latency(
        model,
        groups,
        Forward,
        levels=all_levels(groups),
        cache=tmp_path,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert costs.unit == "seconds"
    jobs = (len(WIDTHS["ffn"]) - 1) + (len(WIDTHS["mha"]) - 1)
    assert clock.runs == -(-jobs // 3)
    assert seen[-1] == (jobs, jobs)
    assert [total for _, total in seen] == [jobs] * clock.runs
    for group in groups:
        widths = WIDTHS[group.kind]
        assert set(costs.tables[group.name]) == set(widths)
        for width in widths:
            expected = straight(group.kind, width) - straight(group.kind, widths[-1])
            assert costs.of(group.name, width) == pytest.approx(expected, rel=1e-12)
    assert costs.total({}) == pytest.approx(clock.seconds(model), rel=1e-12)
    # The clock is additive, so that uneven widths are predicted too.
    uneven = {g.name: WIDTHS[g.kind][i % 4] for i, g in enumerate(groups)}
    expected = 5.0 + sum(straight(g.kind, uneven[g.name]) for g in groups)
    assert costs.total(uneven) == pytest.approx(expected, rel=1e-12)
    # Between measured widths: 56 lies half way from 48 to 64.
    assert costs.of(groups[1].name, 56) == pytest.approx((56 - 16) * 0.25, rel=1e-12)


def test_a_width_never_costs_more_than_a_larger_one(bert, clock, tmp_path):
    model, groups = bert
    clock.of_width = lambda kind, width: {64: 30.0, 80: 20.0}.get(width, width * 0.25)
    costs = measure_latency(model, groups, Forward, levels=all_levels(groups), cache=tmp_path)
    ffn = next(g.name for g in groups if g.kind == "ffn")
    assert costs.of(ffn, 64) == pytest.approx(25.0 - 4.0, rel=1e-12)
    assert costs.of(ffn, 80) == costs.of(ffn, 64)
    assert costs.total({}) == pytest.approx(clock.seconds(model), rel=1e-12)


def test_many_levels_are_thinned_and_keep_their_ends(bert, clock, tmp_path):
    model, groups = bert
    levels = {g.name: range(2, g.num_units + 1) for g in groups if g.kind == "ffn"}
    costs = measure_latency(model, groups, Forward, levels=levels, cache=tmp_path)
    for group in groups:
        table = costs.tables[group.name]
        if group.kind == "ffn":
            assert len(table) == 8
            assert (min(table), max(table)) == (2, FFN)
            assert max(b - a for a, b in pairwise(sorted(table))) <= -(-(FFN - 2) // 7)
        else:  # not asked for: part of what is fixed
            assert table == {HEADS: 0.0}


def test_all_groups_of_a_class_are_cut_and_the_rest_is_shared(bert, clock, tmp_path):
    model, groups = bert
    before = {n: t.clone() for n, t in model.state_dict().items()}
    places = {n: t.data_ptr() for n, t in model.named_parameters()}
    config = model.config.to_dict()
    measure_latency(model, groups, Forward, levels=all_levels(groups), cache=tmp_path)
    for dense, *copies in clock.timed:
        assert dense is model
        for small in copies:
            own = {n for n, p in small.named_parameters() if p.data_ptr() != places[n]}
            cut = {n for n, p in small.named_parameters() if p.shape != before[n].shape}
            assert own == cut
            assert len(cut) in (3 * LAYERS, 7 * LAYERS)  # an FFN has 3 tensors to cut, heads 7
            assert all(b is model.get_buffer(n) for n, b in small.named_buffers())
    state = model.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in state.items())
    assert {n: t.data_ptr() for n, t in model.named_parameters()} == places
    assert model.config.to_dict() == config
    assert "slim_plan" not in vars(model)


def test_groups_of_several_layers_are_one_class_by_themselves(monkeypatch, tmp_path):
    model = FAMILIES["mpnet"]()
    groups = slimkern.discover(model).groups
    joint = next(g for g in groups if g.between)
    counted = {(a.module, a.name): a.per_unit * HEADS for a in joint.attributes}
    assert counted

    def counts(of: nn.Module) -> dict[tuple[str, str], int]:
        return {
            (a.module, a.name): getattr(of.get_submodule(a.module), a.name)
            for a in joint.attributes
        }

    def clock(candidates, *, check, rounds, threads):
        check({name: call() for name, call in candidates.items()})
        for name, call in candidates.items():
            assert (counts(call.model) == counted) == (name == "dense")
        heads = {n: c.model.get_submodule(joint.name).in_features for n, c in candidates.items()}
        return {name: Timing((float(width),)) for name, width in heads.items()}

    monkeypatch.setattr(timing, "time_interleaved", clock)
    levels = {joint.name: (4, 2, 1)}
    costs = measure_latency(model, groups, Forward, levels=levels, cache=tmp_path)
    assert costs.tables[joint.name] == {1: 0.0, 2: 12.0, 4: 36.0}
    assert costs.fixed == 12.0
    assert counts(model) == counted


def test_a_real_clock(bert, tmp_path):
    model, groups = bert
    levels = {g.name: (g.num_units, 1) for g in groups}
    costs = measure_latency(
        model, groups, Forward, levels=levels, rounds=3, threads=1, cache=tmp_path
    )
    assert costs.total({}) > 0
    for name, table in costs.tables.items():
        assert table[min(table)] == 0.0
        assert costs.of(name, max(table)) >= 0
    again = measure_latency(model, groups, refuse, levels=levels, threads=1, cache=tmp_path)
    assert again == costs


def test_nothing_is_timed_that_is_not_finite(tmp_path):
    model = mlp(10, 24, 10)
    groups = slimkern.discover(model, torch.zeros(4, 10)).groups
    levels = {groups[0].name: (24, 8)}
    outputs = {
        "holds NaN or infinities": lambda m: lambda: {"out": [m(torch.full((2, 10), torch.inf))]},
        "returned int without": lambda m: lambda: 3,
        "returned tuple without": lambda m: lambda: (torch.tensor(1), None),
    }
    for message, call in outputs.items():
        with pytest.raises(ValueError, match=message):
            measure_latency(model, groups, call, levels=levels, rounds=3, cache=tmp_path)
    assert not list(tmp_path.iterdir())


def test_levels_that_make_no_sense_are_refused(bert, tmp_path):
    model, groups = bert
    with pytest.raises(KeyError, match=r"levels names no group of these: \['nothing'\]"):
        measure_latency(model, groups, refuse, levels={"nothing": (1,)}, cache=tmp_path)
    for width in (0, HEADS + 1):
        with pytest.raises(ValueError, match=f"accepted: 1 to {HEADS} units"):
            measure_latency(
                model, groups, refuse, levels={groups[0].name: (width,)}, cache=tmp_path
            )


def test_without_levels_the_dense_time_is_fixed(bert, clock, tmp_path):
    model, groups = bert
    clock.runs = 2  # the next run is at the true speed
    costs = measure_latency(model, groups, Forward, levels={}, cache=tmp_path)
    assert costs.fixed == costs.total({}) == clock.seconds(model)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=9))
def test_monotone_is_the_nearest_monotone_sequence(values):
    found = monotone(values)
    assert all(a <= b for a, b in pairwise(found))
    # The known closed form: the largest over starts of the smallest over ends of the mean between.
    n = len(values)
    for i in range(n):
        expected = max(
            min(sum(values[j : k + 1]) / (k + 1 - j) for k in range(i, n)) for j in range(i + 1)
        )
        assert found[i] == pytest.approx(expected, abs=1e-12 * 20)
