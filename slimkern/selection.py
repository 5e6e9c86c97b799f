"""Which units stay under a target: ranking, floors and limits, ties, rounding. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SCOPES = ("local", "global")
_EPS = 1e-9  # 0.29 * 100 is 28.999... in binary: a target that is a whole number must be met


def round_width(width: int, multiple_of: int, num_units: int) -> int:
    """The smallest multiple of ``multiple_of`` that holds ``width``, at most ``num_units``."""
    return min(num_units, -(-width // multiple_of) * multiple_of)


def kept_units(num_units: int, sparsity: float, multiple_of: int = 1) -> int:
    """How many units stay where the fraction ``sparsity`` goes: at least 1, rounded up.

    As :func:`select` counts in the local scope.
    """
    gone = min(int(sparsity * num_units + _EPS), num_units - 1)
    return round_width(num_units - gone, multiple_of, num_units)


def select(
    scores: Mapping[str, Tensor],
    sparsity: float,
    *,
    scope: str = "local",
    multiple_of: int = 1,
    min_units: int = 1,
    min_sparsity: float = 0.0,
    max_sparsity: float = 1.0,
) -> tuple[dict[str, tuple[int, ...]], tuple[str, ...]]:
    """The units that stay when the fraction ``sparsity`` with the lowest scores goes.

    With ``k = int(sparsity * units)`` exactly the k lowest-scored units go (per group in the local
    scope, over all groups in the global one); equal scores go by index. Then each group's width is
    rounded **up** to a multiple of ``multiple_of``: its best-scored removed units stay.

    Args:
        scores: a 1-D tensor per group, one score per unit.
        sparsity: the fraction to remove, in [0, 1).
        scope: ``local`` (each group loses the fraction) or ``global`` (all groups together).
        multiple_of: the width that remains is a multiple of it (or the full width).
        min_units: units that stay in every group.
        min_sparsity: each group loses at least this fraction, global scope.
        max_sparsity: no group loses more than this fraction.

    Returns:
        kept indices per group, sorted; and notes on what could not be done as asked.

    Raises:
        ValueError: an argument is out of range, or a score is NaN.
    """
    _check_selection(scores, sparsity, scope, multiple_of, min_units)
    order = {n: torch.argsort(s.detach().float().cpu(), stable=True) for n, s in scores.items()}
    size = {n: len(o) for n, o in order.items()}
    cap = {n: max(0, min(z - min_units, int(max_sparsity * z + _EPS))) for n, z in size.items()}
    if scope == "local":
        gone = {n: min(int(sparsity * z + _EPS), cap[n]) for n, z in size.items()}
    else:
        floor = {n: min(int(min_sparsity * z + _EPS), cap[n]) for n, z in size.items()}
        gone = _global_counts(scores, order, floor, cap, int(sparsity * sum(size.values()) + _EPS))
    keep, notes = {}, []
    for name, ranked in order.items():
        width = round_width(size[name] - gone[name], multiple_of, size[name])
        if gone[name] and width == size[name]:
            notes.append(
                f"{name}: rounding {size[name] - gone[name]} of {size[name]} units up to a "
                f"multiple of {multiple_of} cancels the whole cut"
            )
        keep[name] = tuple(sorted(ranked[size[name] - width :].tolist()))
    asked = int(sparsity * sum(size.values()) + _EPS) if scope == "global" else 0
    if sum(gone.values()) < asked:
        notes.append(f"floors and limits allow {sum(gone.values())} of {asked} units to go")
    return keep, tuple(notes)


def _check_selection(
    scores: Mapping[str, Tensor], sparsity: float, scope: str, multiple_of: int, min_units: int
) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in [0, 1), got {sparsity}")
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {SCOPES}, got {scope!r}")
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be at least 1, got {multiple_of}")
    if min_units < 1:
        raise ValueError(f"min_units must be at least 1, got {min_units}")
    for name, score in scores.items():
        if score.dim() != 1:
            raise ValueError(f"scores of {name!r} must be 1-D, got shape {tuple(score.shape)}")
        if torch.isnan(score).any():
            raise ValueError(f"scores of {name!r} hold NaN: {int(torch.isnan(score).sum())}")


def _global_counts(
    scores: Mapping[str, Tensor],
    order: Mapping[str, Tensor],
    floor: Mapping[str, int],
    cap: Mapping[str, int],
    total: int,
) -> dict[str, int]:
    """How many units each group loses when the ``total`` lowest scores of all go."""
    gone = dict(floor)
    queue = [
        (score, position, rank, name)
        for position, (name, ranked) in enumerate(order.items())
        for rank, score in enumerate(scores[name].detach().float().cpu()[ranked].tolist())
        if floor[name] <= rank < cap[name]
    ]
    queue.sort()
    for _, _, _, name in queue[: max(0, total - sum(gone.values()))]:
        gone[name] += 1
    return gone
