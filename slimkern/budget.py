"""Widths under a budget: which level each group takes, so that the errors add up to the least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

# A budget may come out of sums of floats, and lie below the very sum it was meant to be.
_ROUNDING = Fraction(1, 10**12)


@dataclass(frozen=True)
class Choice:
    """The widths that one group can take, with what each loses and what it costs.

    Attributes:
        group: the group's name.
        kept: units kept, one entry per level.
        errors: what the model loses at that level; only sums and differences matter.
        costs: what it costs there, in the unit of the budget.
    """

    group: str
    kept: tuple[int, ...]
    errors: tuple[float, ...]
    costs: tuple[float, ...]

    def __post_init__(self) -> None:
        sizes = (len(self.kept), len(self.errors), len(self.costs))
        if len(set(sizes)) != 1 or not self.kept:
            raise ValueError(
                f"choice {self.group!r} has {sizes[0]} widths, {sizes[1]} errors and {sizes[2]} "
                "costs; accepted: one of each per level, at least one level"
            )
        for name, values in (("errors", self.errors), ("costs", self.costs)):
            if not all(math.isfinite(v) for v in values):
                raise ValueError(f"choice {self.group!r}: {name} are {values}; all must be finite")


def levels(num_units: int, multiple_of: int, count: int | None = None) -> tuple[int, ...]:
    """The widths that a group may take, descending: full, then multiples of ``multiple_of``.

    Args:
        num_units: the full width.
        multiple_of: the widths below it are multiples of this, down to ``multiple_of`` itself.
        count: at most this many, thinned geometrically (equal ratios, so that narrow widths lie
            close together); the full and the smallest width stay. ``None``: all.

    Raises:
        ValueError: an argument is out of range.
    """
    if num_units < 1 or multiple_of < 1:
        raise ValueError(
            f"num_units is {num_units} and multiple_of {multiple_of}; accepted: at least 1"
        )
    if count is not None and count < 2:
        raise ValueError(f"count is {count}; accepted: at least 2 (full and smallest), or None")
    top = (num_units - 1) // multiple_of * multiple_of
    grid = np.array([num_units, *range(top, 0, -multiple_of)])
    if count is not None and len(grid) > count:
        wanted = np.geomspace(grid[0], grid[-1], count)
        nearest = np.abs(grid[None, :] - wanted[:, None]).argmin(axis=1)
        grid = grid[np.unique(nearest)]
    return tuple(grid.tolist())


def allocate(choices: Sequence[Choice], budget: float, buckets: int = 10_000) -> dict[str, int]:
    """Pick one level per group: the least sum of errors whose costs add up to ``budget`` at most.

    ``min Σ error_g(level_g)  s.t.  Σ cost_g(level_g) <= budget``: a dynamic programme over
    discretised cost (SPDY: Frantar and Alistarh, 2022). What lies between the cheapest total and
    the budget is divided into ``buckets`` equal parts, and what a level costs above the cheapest
    level of its group is rounded **up** to whole parts, so that the budget is never exceeded.
    Where everybody's favourite level fits, that is the answer; what rounding left unspent goes to
    the single changes that gain most.

    The errors add up to no more than the best that an exact search finds for
    ``budget - len(choices) * (budget - cheapest total) / buckets``. Equal errors go to the cheaper
    level; the result depends on nothing but the arguments.

    Args:
        choices: one per group.
        budget: in the unit of the costs. It may be exceeded by its 1e-12th part, which is what
            rounding does to the sums of floats that budgets are made of.
        buckets: parts of the budget, at least 1. Time and memory grow with
            ``levels * buckets`` and ``groups * buckets``.

    Returns:
        ``{group: units kept}``, in the order of ``choices``.

    Raises:
        ValueError: the budget is below the cheapest total, which the message names; there is no
            choice; a group is named twice; or an argument is out of range.
    """
    _check(choices, budget, buckets)
    options = [_useful(c) for c in choices]
    exact = [[Fraction(c.costs[i]) for i in o] for c, o in zip(choices, options)]
    limit = Fraction(budget) + abs(Fraction(budget)) * _ROUNDING
    spare = limit - sum(costs[0] for costs in exact)
    if spare < 0:
        raise ValueError(
            f"budget is {budget:g}; the smallest total that these choices reach is "
            f"{math.fsum(min(c.costs) for c in choices):g}"
        )
    best = [len(o) - 1 for o in options]
    if sum(costs[-1] - costs[0] for costs in exact) > spare:
        best = _search(choices, options, exact, spare, buckets) if spare else [0] * len(choices)
        _spend_rest(choices, options, exact, best, spare)
    return {c.group: c.kept[o[i]] for c, o, i in zip(choices, options, best)}


def _check(choices: Sequence[Choice], budget: float, buckets: int) -> None:
    if not choices:
        raise ValueError("choices is empty; accepted: at least one group")
    names = [c.group for c in choices]
    if len(set(names)) != len(names):
        raise ValueError(f"choices names a group twice: {names}")
    if not math.isfinite(budget):
        raise ValueError(f"budget is {budget}; accepted: a finite number")
    if buckets < 1:
        raise ValueError(f"buckets is {buckets}; accepted: at least 1")


def _useful(choice: Choice) -> list[int]:
    """The levels that no other beats at the same or a lower cost: dearer means better from here.

    Indices by ascending cost, so with strictly descending errors.
    """
    order = sorted(range(len(choice.kept)), key=lambda i: (choice.costs[i], choice.errors[i]))
    useful = [order[0]]
    for i in order[1:]:
        if choice.errors[i] < choice.errors[useful[-1]]:
            useful.append(i)
    return useful


def _search(
    choices: Sequence[Choice],
    options: list[list[int]],
    exact: list[list[Fraction]],
    spare: Fraction,
    buckets: int,
) -> list[int]:
    """The dynamic programme. ``error[b]`` is the least error of the groups so far within ``b``
    parts, ``spent[b]`` what that really costs (to tell equal errors apart)."""
    error, spent = np.zeros(buckets + 1), np.zeros(buckets + 1)
    picks: list[NDArray[np.int32]] = []
    parts: list[list[int]] = []
    for choice, option, costs in zip(choices, options, exact):
        extra = [c - costs[0] for c in costs]
        need = [math.ceil(e * buckets / spare) if e else 0 for e in extra]
        need = need[: sum(n <= buckets for n in need)]
        new, cost = np.full_like(error, np.inf), np.full_like(spent, np.inf)
        pick = np.zeros(buckets + 1, dtype=np.int32)
        for i, n in enumerate(need):
            e = error[: buckets + 1 - n] + choice.errors[option[i]]
            s = spent[: buckets + 1 - n] + float(extra[i])
            better = (e < new[n:]) | ((e == new[n:]) & (s < cost[n:]))
            new[n:][better], cost[n:][better], pick[n:][better] = e[better], s[better], i
        error, spent = new, cost
        picks.append(pick)
        parts.append(need)
    best, left = [0] * len(choices), buckets
    for g in reversed(range(len(choices))):
        best[g] = int(picks[g][left])
        left -= parts[g][best[g]]
    return best


def _spend_rest(
    choices: Sequence[Choice],
    options: list[list[int]],
    exact: list[list[Fraction]],
    best: list[int],
    spare: Fraction,
) -> None:
    """Spend what rounding up left over, in place: the change of one group that gains most, while
    there is one that fits exactly."""
    rest = spare - sum(costs[i] - costs[0] for costs, i in zip(exact, best))
    while True:
        found: tuple[float, Fraction, int, int] | None = None
        for g, (choice, option, costs) in enumerate(zip(choices, options, exact)):
            for i in range(best[g] + 1, len(option)):
                more = costs[i] - costs[best[g]]
                if more > rest:
                    break
                gain = choice.errors[option[i]] - choice.errors[option[best[g]]]
                if found is None or (gain, more, g, i) < found:
                    found = (gain, more, g, i)
        if found is None:
            return
        _, more, g, i = found
        best[g], rest = i, rest - more
