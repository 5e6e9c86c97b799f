"""Allocation under a budget: as good as brute force up to rounding, never above the budget."""

from __future__ import annotations

import math
import time
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimkern.budget import Choice, allocate, levels


def chosen(choices, widths):
    """The exact cost and the error of an allocation."""
    at = [(c, c.kept.index(widths[c.group])) for c in choices]
    return sum(Fraction(c.costs[i]) for c, i in at), sum(Fraction(c.errors[i]) for c, i in at)


def every(choices):
    """The exact cost and error of every combination."""
    for combination in product(*(range(len(c.kept)) for c in choices)):
        pairs = [(c.costs[i], c.errors[i]) for c, i in zip(choices, combination)]
        yield sum(Fraction(c) for c, _ in pairs), sum(Fraction(e) for _, e in pairs)


def limit_of(budget):
    """The budget with the part that allocate allows for the rounding of its caller's sums."""
    return Fraction(budget) + abs(Fraction(budget)) / 10**12


@st.composite
def problems(draw, number):
    groups = draw(st.integers(1, 4))
    choices = []
    for g in range(groups):
        size = draw(st.integers(1, 5))
        values = st.lists(number, min_size=size, max_size=size)
        kept = tuple(range(size, 0, -1))
        choices.append(Choice(f"g{g}", kept, tuple(draw(values)), tuple(draw(values))))
    cheapest = math.fsum(min(c.costs) for c in choices)
    dearest = math.fsum(max(c.costs) for c in choices)
    share = draw(st.floats(0, 1.2))
    return choices, cheapest + share * (dearest - cheapest), draw(st.sampled_from([1, 7, 100]))


FLOATS = st.floats(0, 1e6, allow_subnormal=False)
INTEGERS = st.integers(0, 12).map(float)


def check_against_brute_force(choices, budget, buckets):
    limit = limit_of(budget)
    everything = list(every(choices))
    cheapest = min(cost for cost, _ in everything)
    if cheapest > limit:  # the strategy's own sum has rounded down
        return
    cost, error = chosen(choices, allocate(choices, budget, buckets))
    assert cost <= limit
    slack = len(choices) * (limit - cheapest) / buckets
    within = [e for c, e in everything if c <= limit - slack]
    if within:
        # The programme compares sums of floats: the order of two may flip within their rounding.
        rounding = len(choices) * np.finfo(float).eps * sum(max(c.errors) for c in choices)
        assert error <= min(within) + Fraction(rounding)
    assert error >= min(e for c, e in everything if c <= limit)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problems(FLOATS))
def test_no_worse_than_brute_force_at_the_budget_less_its_rounding(problem):
    check_against_brute_force(*problem)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problems(INTEGERS))
def test_the_same_where_many_sums_are_equal(problem):
    check_against_brute_force(*problem)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(problems(INTEGERS))
def test_whole_numbers_that_the_buckets_divide_are_solved_exactly_and_cheaply(problem):
    choices, budget, _ = problem
    budget = math.floor(budget)
    cheapest = sum(min(c.costs) for c in choices)
    if budget < cheapest:
        return
    # One bucket per whole number (the allowance for rounding makes each a hair larger).
    cost, error = chosen(choices, allocate(choices, budget, max(1, int(budget - cheapest))))
    best = min((e, c) for c, e in every(choices) if c <= budget)
    assert (error, cost) == best


def test_a_budget_of_the_dense_total_is_dense():
    choices = [
        Choice("a", (3, 2, 1), (0.0, 0.1, 0.5), (0.3, 0.2, 0.1)),
        Choice("b", (2, 1), (0.0, 0.2), (0.1, 0.05)),
        Choice("c", (9, 4), (0.0, 1e-9), (0.7, 0.1)),
    ]
    dense = {"a": 3, "b": 2, "c": 9}
    total = 0.1 + 0.3 + 0.7  # one of the orders in which a caller may sum
    for budget in (total, 0.7 + 0.3 + 0.1, math.nextafter(total, 0), 2 * total):
        assert allocate(choices, budget) == dense
    assert allocate(choices, total * (1 - 1e-9)) != dense


def test_the_cheapest_total_is_reached_and_one_below_is_refused():
    choices = [
        Choice("a", (2, 1), (0.0, 1.0), (5.0, 3.0)),
        Choice("b", (2, 1), (0.0, 1.0), (4.0, 2.5)),
    ]
    assert allocate(choices, 5.5) == {"a": 1, "b": 1}
    assert allocate([Choice("a", (2, 1), (0.0, 1.0), (5.0, 0.0))], 0.0) == {"a": 1}
    with pytest.raises(ValueError, match=r"budget is 5\.4; the smallest total .* is 5\.5"):
        allocate(choices, 5.4)


def test_what_rounding_left_is_spent():
    # With one bucket every level above the cheapest costs the whole budget: the programme can
    # afford one of them. The rest pays for the other two.
    choices = [Choice(n, (2, 1), (0.0, 1.0), (1.0, 0.0)) for n in "abc"]
    choices.append(Choice("d", (2, 1), (0.0, 1.0), (10.0, 0.0)))
    assert allocate(choices, 3.0, buckets=1) == {"a": 2, "b": 2, "c": 2, "d": 1}


def test_equal_errors_go_to_the_cheaper_level():
    tied = Choice("a", (4, 3, 2, 1), (0.0, 0.0, 0.5, 0.5), (4.0, 3.0, 2.0, 1.0))
    assert allocate([tied], 10.0) == {"a": 3}
    assert allocate([tied], 2.5) == {"a": 1}
    # Across groups: raising either gains the same; b's is cheaper, whichever comes first.
    a = Choice("a", (2, 1), (0.0, 1.0), (3.0, 1.0))
    b = Choice("b", (2, 1), (0.0, 1.0), (2.5, 1.0))
    assert allocate([a, b], 4.2) == allocate([b, a], 4.2) == {"a": 1, "b": 2}


def test_the_order_of_levels_does_not_matter():
    up = Choice("a", (1, 2, 3), (0.9, 0.2, 0.0), (1.0, 2.0, 3.0))
    down = Choice("a", (3, 2, 1), (0.0, 0.2, 0.9), (3.0, 2.0, 1.0))
    assert allocate([up], 2.5) == allocate([down], 2.5) == {"a": 2}


def test_a_model_of_24_groups_is_quick():
    random = np.random.default_rng(0)
    choices = [
        Choice(
            f"g{g}",
            tuple(range(50, 0, -1)),
            tuple(np.sort(random.random(50)).tolist()),
            tuple(np.sort(random.random(50))[::-1].tolist()),
        )
        for g in range(24)
    ]
    start = time.process_time()
    widths = allocate(choices, 10.0)
    assert time.process_time() - start < 2
    assert list(widths) == [c.group for c in choices]
    assert chosen(choices, widths)[0] <= limit_of(10.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((("a"), (), (), ()), "0 widths, 0 errors and 0 costs"),
        ((("a"), (2, 1), (0.0,), (2.0, 1.0)), "2 widths, 1 errors and 2 costs"),
        ((("a"), (2, 1), (0.0, math.nan), (2.0, 1.0)), "'a': errors are .* must be finite"),
        ((("a"), (2, 1), (0.0, 1.0), (math.inf, 1.0)), "'a': costs are .* must be finite"),
    ],
)
def test_choices_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Choice(*arguments)


def test_calls_that_make_no_sense_are_refused():
    one = Choice("a", (1,), (0.0,), (1.0,))
    with pytest.raises(ValueError, match="choices is empty"):
        allocate([], 1.0)
    with pytest.raises(ValueError, match=r"names a group twice: \['a', 'a'\]"):
        allocate([one, one], 2.0)
    with pytest.raises(ValueError, match="budget is nan"):
        allocate([one], math.nan)
    with pytest.raises(ValueError, match="buckets is 0"):
        allocate([one], 1.0, buckets=0)


def test_levels_are_a_descending_grid():
    assert levels(12, 1) == tuple(range(12, 0, -1))
    assert levels(80, 32) == (80, 64, 32)
    assert levels(96, 32) == (96, 64, 32)
    assert levels(20, 32) == (20,)
    assert levels(1, 1) == (1,)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 5000), st.integers(1, 64), st.integers(2, 40))
def test_thinned_levels_are_of_the_grid_and_keep_its_ends(num_units, multiple_of, count):
    whole = levels(num_units, multiple_of)
    thin = levels(num_units, multiple_of, count)
    assert set(thin) <= set(whole)
    assert list(thin) == sorted(thin, reverse=True)
    assert (thin[0], thin[-1]) == (whole[0], whole[-1])
    assert len(thin) <= count
    assert len(whole) > count or thin == whole


def test_thinned_levels_keep_ratios_rather_than_distances():
    assert levels(1024, 1, 11) == tuple(2**i for i in range(10, -1, -1))


def test_levels_refuse_what_is_out_of_range():
    with pytest.raises(ValueError, match="num_units is 0"):
        levels(0, 1)
    with pytest.raises(ValueError, match="multiple_of 0"):
        levels(4, 0)
    with pytest.raises(ValueError, match="count is 1"):
        levels(4, 1, 1)
