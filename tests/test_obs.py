"""Structured OBS: the order, the cost and the updates against a solve from scratch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimkern.calibration.obs import Layer, remove


def layer(units: int, size: int, out: int = 7, seed: int = 0, rows: int = 400) -> Layer:
    random = torch.Generator().manual_seed(seed)
    n = units * size
    mix = torch.randn(n, n, generator=random, dtype=torch.float64)
    x = torch.randn(rows, n, generator=random, dtype=torch.float64) @ mix
    weight = torch.randn(out, n, generator=random, dtype=torch.float64)
    return Layer(weight, x.T @ x / rows, size)


def lost(one: Layer, keep: tuple[int, ...], damping: float) -> float:
    """``min over W' on the kept columns of tr((W' - W) H (W' - W)ᵀ)``, damped, by one solve."""
    h = one.hessian + damping * one.hessian.diagonal().mean() * torch.eye(
        len(one.hessian), dtype=torch.float64
    )
    columns = (torch.tensor(keep)[:, None] * one.unit_size + torch.arange(one.unit_size)).flatten()
    best = torch.zeros_like(one.weight)
    best[:, columns] = torch.linalg.solve(h[columns][:, columns], h[columns] @ one.weight.T).T
    off = best - one.weight
    energy = torch.trace(one.weight @ one.hessian @ one.weight.T)
    return float(torch.trace(off @ h @ off.T) / energy)


def greedy(one: Layer, kept: int, damping: float) -> tuple[int, ...]:
    """The exact greedy order, every candidate tried by a solve from scratch."""
    alive = list(range(one.weight.shape[1] // one.unit_size))
    while len(alive) > kept:
        cheapest = min(alive, key=lambda u: lost(one, tuple(v for v in alive if v != u), damping))
        alive.remove(cheapest)
    return tuple(alive)


def close(found: float, expected: float, condition: float) -> None:
    assert abs(found - expected) <= 1e3 * torch.finfo(torch.float64).eps * condition


def condition(one: Layer, damping: float) -> float:
    h: Tensor = one.hessian + damping * one.hessian.diagonal().mean() * torch.eye(
        len(one.hessian), dtype=torch.float64
    )
    return float(torch.linalg.cond(h))


@pytest.mark.parametrize(("units", "size"), [(17, 1), (9, 1), (5, 4), (3, 8)])
def test_one_by_one_is_the_exact_greedy_choice(units: int, size: int) -> None:
    one = layer(units, size)
    levels = list(range(1, units + 1))
    removal = remove([one], levels, chunk=1)
    for kept in levels:
        keep = removal.keep(units, kept)
        assert keep == greedy(one, kept, 0.01)
        close(removal.errors[kept], lost(one, keep, 0.01), condition(one, 0.01))


@pytest.mark.parametrize("chunk", [1, 3, 16, 1000])
@pytest.mark.parametrize(("units", "size"), [(300, 1), (40, 5)])
def test_the_error_is_that_of_the_units_that_went(units: int, size: int, chunk: int) -> None:
    """Also over many updates, where rows wait and matrices shrink."""
    one = layer(units, size, rows=2000)
    levels = [units, units // 2, units // 3, 1]
    removal = remove([one], levels, chunk=chunk)
    assert len(removal.order) == units - 1 == len(set(removal.order))
    assert removal.errors[units] == 0.0
    for kept in levels[1:]:
        expected = lost(one, removal.keep(units, kept), 0.01)
        close(removal.errors[kept], expected, condition(one, 0.01))


def test_dead_and_doubled_channels_go_first_and_for_nothing() -> None:
    one = layer(20, 1)
    weight, hessian = one.weight.clone(), one.hessian.clone()
    weight[:, 3] = 0.0
    hessian[7], hessian[:, 7] = 0.0, 0.0
    hessian[11], hessian[:, 11] = hessian[5], hessian[:, 5]
    hessian[11, 11] = hessian[5, 11] = hessian[11, 5] = hessian[5, 5]
    removal = remove([Layer(weight, hessian)], [17], damping=1e-9, chunk=1)
    assert {3, 7} < set(removal.order)
    assert set(removal.order) & {5, 11}
    assert removal.errors[17] < 1e-6


def test_inputs_that_are_all_zero_are_survived() -> None:
    one = layer(6, 2)
    removal = remove([Layer(one.weight, torch.zeros(12, 12, dtype=torch.float64), 2)], [2])
    assert len(removal.order) == 4


def test_layers_that_share_units_have_the_same_say_at_any_scale() -> None:
    a, b = layer(12, 1, seed=1), layer(12, 2, seed=2)
    loud = Layer(b.weight * 1e4, b.hessian, 2)
    quiet = remove([a, b], [4], chunk=1)
    assert quiet.order == remove([a, loud], [4], chunk=1).order
    mean = (lost(a, quiet.keep(12, 4), 0.01) + lost(b, quiet.keep(12, 4), 0.01)) / 2
    close(quiet.errors[4], mean, condition(b, 0.01))


def test_what_is_not_accepted_is_named() -> None:
    one = layer(4, 1)
    with pytest.raises(ValueError, match="0 units can't stay of 4"):
        remove([one], [0])
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        remove([one], [2], chunk=0)
    with pytest.raises(ValueError, match="share their units"):
        remove([one, layer(5, 1)], [2])
    with pytest.raises(ValueError, match="hessian is"):
        remove([Layer(one.weight, one.hessian[:3, :3])], [2])
    with pytest.raises(ValueError, match="not finite"):
        remove([Layer(one.weight * float("nan"), one.hessian)], [2])
