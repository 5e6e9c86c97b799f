"""The schedule: the formulas, their exact ends, prune steps, and steps derived from a length."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimkern.schedule import DECAYS, derive_steps, prune_steps, sparsity_at


@pytest.mark.parametrize("decay", DECAYS)
@given(
    start=st.integers(0, 300),
    length=st.integers(0, 500),
    frequency=st.integers(1, 600),
    target=st.floats(0, 0.99),
)
def test_every_decay_ends_exactly_at_its_target_and_never_falls(
    decay, start, length, frequency, target
):
    end = start + length
    steps = prune_steps(start, end, frequency)
    values = [sparsity_at(s, steps, target, decay) for s in range(end + 2)]
    assert values[-1] == values[end] == target
    assert sparsity_at(steps[-1], steps, target, decay) == target
    assert values == sorted(values)
    assert all(v == 0 for v in values[: steps[0]])
    assert start <= steps[0] <= steps[-1] <= end


def test_the_target_survives_truncation_to_whole_units_at_every_length():
    for decay in DECAYS:
        for n in range(1, 101):
            for target in (0.25, 0.5, 0.75):
                value = sparsity_at(n, prune_steps(0, n, 1), target, decay)
                assert int(value * 256) == int(target * 256), (decay, n, target)


@pytest.mark.parametrize(
    ("decay", "formula"),
    [
        ("exp", lambda x, s0, s: 1 - (1 - s0) * ((1 - s) / (1 - s0)) ** x),
        ("cos", lambda x, s0, s: s0 + (s - s0) * (1 - math.cos(math.pi / 2 * x))),
        ("linear", lambda x, s0, s: s0 + (s - s0) * x),
        ("cube", lambda x, s0, s: s0 + (s - s0) * x**3),
    ],
)
def test_the_formulas(decay, formula):
    steps = prune_steps(10, 50, 4)
    assert len(steps) == 10
    for c, step in enumerate(steps[:-1], start=1):
        for initial in (0.0, 0.2):
            expected = formula(c / 10, initial, 0.8)
            assert sparsity_at(step, steps, 0.8, decay, initial) == pytest.approx(expected, abs=0)


def test_the_reference_recipe_step_by_step():
    steps = prune_steps(359, 3593, 500)
    assert list(steps) == [859, 1359, 1859, 2359, 2859, 3359]
    ratios = [sparsity_at(s, steps, 0.8, "exp") for s in steps]
    assert ratios == pytest.approx([0.2353, 0.4152, 0.5528, 0.6580, 0.7385, 0.8], abs=1e-4)
    heads = [int(sparsity_at(s, steps, 0.6, "exp") * 12 + 1e-9) for s in steps]
    assert heads == [1, 3, 4, 5, 6, 7]


def test_one_shot_and_a_frequency_longer_than_the_interval_cut_once():
    assert list(prune_steps(7, 7, 1)) == [7]
    assert list(prune_steps(0, 0, 100)) == [0]
    assert list(prune_steps(0, 10, 100)) == [10]  # by then gradients have been seen
    assert sparsity_at(9, prune_steps(0, 10, 100), 0.5) == 0


def test_steps_derived_from_the_length_of_training_follow_the_recipe():
    derived = derive_steps(total_steps=4680)
    assert derived == {"start_step": 360, "end_step": 3600, "pruning_frequency": 81}
    steps = prune_steps(*derived.values())
    assert len(steps) == 40
    assert steps[-1] == 3600
    assert derive_steps(total_steps=4680, end_step=100)["start_step"] == 100
    given = derive_steps(start_step=5, pruning_frequency=7, total_steps=130)
    assert given == {"start_step": 5, "end_step": 100, "pruning_frequency": 7}


@given(st.integers(1, 10_000))
def test_any_length_of_training_derives_a_schedule_inside_it(total):
    derived = derive_steps(total_steps=total)
    steps = prune_steps(*derived.values())
    assert 1 <= steps[0] <= steps[-1] <= derived["end_step"] <= total


def test_what_was_not_given_stays_open():
    assert derive_steps() == {"start_step": 0, "end_step": None, "pruning_frequency": 1}


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ({"start_step": 5, "end_step": 4}, "end_step=4 comes before start_step=5"),
        ({"end_step": 11, "total_steps": 10}, "end_step=11 comes after"),
    ],
)
def test_contradictory_steps_are_errors(steps, words):
    with pytest.raises(ValueError, match=words):
        derive_steps(**steps)


def test_an_unknown_decay_is_an_error():
    with pytest.raises(ValueError, match=r"exp, cos, linear, cube.*'cubic'"):
        sparsity_at(1, range(1, 2), 0.5, "cubic")
