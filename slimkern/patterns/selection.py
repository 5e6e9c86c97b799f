"""Which items of which layers go under a target: exact counts, limits per layer, ties by order.

An item is a block, or a group of M for ``N:M``. Pure functions of tensors: no Python loop runs over
items, of which a model may have many millions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from slimkern.patterns.pattern import BlockPattern


def lowest(scores: Tensor, count: int) -> Tensor:
    """True for exactly ``count`` of the lowest scores; of equal ones those that come first.

    Args:
        scores: [n], no NaN.
        count: 0 to n.

    Returns:
        bool [n].
    """
    gone = torch.zeros_like(scores, dtype=torch.bool)
    if count == 0:
        return gone
    threshold = scores.kthvalue(count).values
    gone = scores < threshold
    ties = (scores == threshold).nonzero().flatten()
    gone[ties[: count - int(gone.sum())]] = True
    return gone


def select_items(
    scores: Mapping[str, Tensor],
    pattern: BlockPattern,
    sparsity: float,
    *,
    scope: str = "global",
    min_sparsity: float = 0.0,
    max_sparsity: float = 1.0,
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The items that go when the fraction ``sparsity`` of the weights with the lowest scores goes.

    In the local scope every layer loses its fraction. In the global one all layers together do: the
    limits of a layer are filled first, and whatever a layer's limit keeps the others lose instead,
    so that the target is reached to the item wherever the limits allow it. Equal scores go in the
    order of layers, then rows, then columns.

    Args:
        scores: layer name -> fp32 scores of its items, [items].
        pattern: how a sparsity counts in items.
        sparsity: the fraction to remove, 0 to the pattern's limit.
        scope: ``local`` or ``global``.
        min_sparsity: each layer loses at least this fraction (global scope).
        max_sparsity: no layer loses more than this fraction.

    Returns:
        layer name -> bool [items], true for what goes; and notes on what could not be done as
        asked.
    """
    top = min(max_sparsity, pattern.limit)
    cap = {n: pattern.items(top, len(s)) for n, s in scores.items()}
    notes: list[str] = []
    if scope == "local":
        counts = {n: min(cap[n], pattern.items(sparsity, len(s))) for n, s in scores.items()}
        gone = {n: lowest(s, counts[n]) for n, s in scores.items()}
    else:
        floor = {n: min(cap[n], pattern.items(min_sparsity, len(s))) for n, s in scores.items()}
        total = pattern.items(sparsity, sum(map(len, scores.values())))
        gone = _global(scores, floor, cap, total)
        reached = sum(int(g.sum()) for g in gone.values())
        if reached != total:
            notes.append(
                f"pattern {pattern.text}: the limits per layer make {reached} items go instead of "
                f"{total}"
            )
    for name, own in gone.items():
        if sparsity and scope == "local" and not own.any():
            notes.append(
                f"{name}: {sparsity:.4g} of its {len(own)} items of pattern {pattern.text} is less "
                f"than one: nothing goes"
            )
    return gone, tuple(notes)


def _global(
    scores: Mapping[str, Tensor], floor: Mapping[str, int], cap: Mapping[str, int], total: int
) -> dict[str, Tensor]:
    """The ``total`` lowest of all layers, of each at least ``floor`` and at most ``cap``."""
    free = _lowest_of_all(scores, min(total, sum(map(len, scores.values()))))
    if all(floor[n] <= int(own.sum()) <= cap[n] for n, own in free.items()):
        return free  # no limit is reached: what follows would find the same, slower
    gone = {n: lowest(s, floor[n]) for n, s in scores.items()}
    open_to = {n: lowest(s, cap[n]) & ~gone[n] for n, s in scores.items()}
    candidates = {n: s[open_to[n]] for n, s in scores.items()}
    more = min(sum(map(len, candidates.values())), max(0, total - sum(floor.values())))
    for name, picked in _lowest_of_all(candidates, more).items():
        gone[name][open_to[name]] = picked
    return gone


def _lowest_of_all(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """As :func:`lowest`, over all layers in their order."""
    device = next(iter(scores.values())).device
    picked = lowest(torch.cat([s.to(device) for s in scores.values()]), count)
    parts = picked.split([len(s) for s in scores.values()])
    return {n: part.to(s.device) for (n, s), part in zip(scores.items(), parts)}


def group_scores(elements: Tensor, pattern: BlockPattern, reduce_type: str) -> Tensor:
    """Scores of the groups of ``N:M``: those of the N weights that would go, reduced.

    Args:
        elements: fp32 [outputs, inputs], inputs divisible by M.
        pattern: ``N:M``.
        reduce_type: ``mean``, ``sum`` or ``max``.

    Returns:
        fp32 [outputs * inputs / M].
    """
    least = elements.reshape(-1, pattern.of).sort(dim=1, stable=True).values[:, : pattern.zeros]
    if reduce_type == "max":
        return least[:, -1].contiguous()
    return least.mean(1) if reduce_type == "mean" else least.sum(1)


def group_elements(elements: Tensor, gone: Tensor, pattern: BlockPattern) -> Tensor:
    """Which weights go when these groups of ``N:M`` do: the N lowest, of equal ones the first.

    Args:
        elements: fp32 [outputs, inputs].
        gone: bool [outputs * inputs / M].

    Returns:
        bool [outputs, inputs].
    """
    rows = elements.reshape(-1, pattern.of)
    order = rows.argsort(dim=1, stable=True)[:, : pattern.zeros]
    dead = torch.zeros_like(rows, dtype=torch.bool)
    dead.scatter_(1, order, gone[:, None].expand_as(order))
    return dead.view(elements.shape)
