"""Criteria to compare structured OBS with: scores of units, each taken once, before anything goes.

For inputs ``x`` of a second linear ``W`` ``[out, n]``, summed over the columns ``j`` of a unit:

- ``magnitude``: ``Σ_i W_ij²``, and its root in the end: the norm of the unit's columns;
- ``activation``: ``mean_i |W_ij| · ‖x_j‖₂`` (Sun et al., "A simple and effective pruning approach
  for large language models", Wanda, 2024, arXiv:2306.11695, for whole columns);
- ``fluctuation``: ``Var(x_j) · Σ_i W_ij²`` (An et al., "Fluctuation-based adaptive structured
  pruning", FLAP, 2024, arXiv:2312.11983), apt where a bias makes up for the means;
- ``fisher``: ``Σ_b (∂L_b/∂m)²`` over batches, ``m = 1`` multiplying the unit in the linear's input
  (Kwon et al., "A fast post-training pruning framework for transformers", 2022,
  arXiv:2204.09656). It needs a backward pass, the others second moments alone.

Higher stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimkern.calibration.batches import Batch, real_rows
from slimkern.calibration.moments import Moments
from slimkern.calibration.watch import watched
from slimkern.criteria import differentiable
from slimkern.discovery.groups import Group, Member

STATISTICS = ("magnitude", "activation", "fluctuation")  # what unit_scores knows
Loss = Callable[[Any, Batch], Tensor]


@torch.no_grad()
def unit_scores(criterion: str, weight: Tensor, moments: Moments, unit_size: int) -> Tensor:
    """Scores of a second linear's units, from its weight and the moments of its inputs.

    Args:
        criterion: ``magnitude``, ``activation`` or ``fluctuation``.
        weight: ``[out, n]``.
        moments: of the inputs, ``n`` wide.
        unit_size: columns per unit.

    Returns:
        ``[n / unit_size]`` in fp64, higher stays.

    Raises:
        ValueError: the criterion is unknown, sizes do not fit, a criterion that needs inputs has
            seen none, or a score is not finite.
    """
    if criterion not in STATISTICS:
        raise ValueError(f"criterion must be one of {', '.join(STATISTICS)}, got {criterion!r}")
    n = weight.shape[1]
    if n != len(moments.mean_x) or n % unit_size:
        raise ValueError(
            f"weight reads {n} inputs, moments are of {len(moments.mean_x)}, and a unit has "
            f"{unit_size} columns: these do not fit"
        )
    if criterion != "magnitude" and not moments.tokens:
        raise ValueError(f"criterion {criterion!r} needs inputs, and no token was seen")
    weight = weight.double()
    if criterion == "activation":
        norms = (moments.second().diagonal().clamp(min=0) * moments.tokens).sqrt()
        scores = (weight.abs().mean(0) * norms).view(-1, unit_size).sum(1)
    else:
        columns = weight.square().sum(0)
        if criterion == "fluctuation":
            columns = columns * moments.covariance().diagonal().clamp(min=0)
        scores = columns.view(-1, unit_size).sum(1)
        scores = scores.sqrt() if criterion == "magnitude" else scores
    if not scores.isfinite().all():
        raise ValueError(f"criterion {criterion!r}: scores are not finite")
    return scores


def mask_fisher(
    model: nn.Module,
    groups: Iterable[Group],
    batches: Sequence[Batch],
    loss: Loss | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of the units' masks, ``I = Σ_b (∂L_b/∂m)²``.

    The mask is not there: ``∂L/∂m`` is the sum of ``x · ∂L/∂x`` over the real tokens and the unit's
    columns of the second linear's input ``x`` (over all second linears where several share the
    units). The model runs in evaluation mode; modes, ``requires_grad`` and gradients are left as
    they were.

    Args:
        model: dense, or masked in other groups.
        groups: of :func:`slimkern.discover`.
        batches: the calibration batches; each gives one gradient that is squared, so that many
            small ones tell more than a few large ones.
        loss: ``loss(outputs, batch) -> scalar``. Without it no label is needed: the loss is the
            model's first output that is a floating-point tensor, real tokens only, times random
            signs, drawn for every batch. The square of its gradient is an unbiased estimate of the
            diagonal of ``JᵀJ`` (Hutchinson), ``J`` the derivative of all outputs with respect to
            the masks: of how much the outputs change, squared.
        seed: of the signs.
        progress: ``progress("fisher", done, total)`` after every batch.

    Returns:
        ``{group name: [num_units] in fp64}``, higher stays.

    Raises:
        ValueError: there is no batch, a second linear is not reached or is masked, the loss is no
            scalar or does not depend on any unit, or activations or gradients are not finite.
    """
    groups = tuple(groups)
    if not batches:
        raise ValueError("batches holds no batch: there is nothing to score on")
    generator = torch.Generator().manual_seed(seed)
    value_of = (
        loss if loss is not None else lambda outputs, batch: _signed(outputs, batch, generator)
    )
    totals: dict[str, Tensor] = {}
    for done, batch in enumerate(batches, 1):
        for group, slope in zip(groups, _slopes(model, groups, batch, value_of)):
            if not slope.isfinite().all():
                raise ValueError(f"{group.name!r}: a gradient is not finite")
            totals[group.name] = totals.get(group.name, 0) + slope.square()
        if progress is not None:
            progress("fisher", done, len(batches))
    return totals


def _slopes(
    model: nn.Module, groups: Sequence[Group], batch: Batch, value_of: Loss
) -> list[Tensor]:
    """``∂L/∂m`` of one batch, for every group."""
    seen: dict[str, list[Tensor]] = {m.name: [] for g in groups for m in g.consumers}

    def see(name: str, x: Tensor) -> Tensor:
        # A tensor of its own for every reader, also where several read the same; and the inputs of
        # the first layers depend on nothing that has a gradient.
        own = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        seen[name].append(own)
        return own

    with differentiable(model, ()), watched(model, seen, see):
        value = value_of(batch.call(model), batch)
        inputs = [x for each in seen.values() for x in each]
        _check(value, seen)
        found = torch.autograd.grad(value, inputs, allow_unused=True)
    slopes = dict(zip(map(id, inputs), found))
    sums = []
    for group in groups:
        total = torch.zeros(group.num_units, dtype=torch.float64, device=value.device)
        for member in group.consumers:
            for x in seen[member.name]:
                if x.shape[-1] != group.num_units * member.unit_size:
                    raise ValueError(
                        f"{member.name!r} reads {x.shape[-1]} inputs, the group has "
                        f"{group.num_units} units of {member.unit_size}; score the dense model"
                    )
                slope = slopes[id(x)]
                if slope is not None:  # None: the loss does not look at this layer
                    total += _per_unit(real_rows(batch, x, member.name), batch.real(slope), member)
        sums.append(total)
    return sums


def _per_unit(x: Tensor, slope: Tensor, member: Member) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    products = x.detach().to(wide) * slope.to(wide)
    return products.sum(0, dtype=torch.float64).view(-1, member.unit_size).sum(1)


def _check(value: Any, seen: dict[str, list[Tensor]]) -> None:
    missed = sorted(name for name, inputs in seen.items() if not inputs)
    if missed:
        raise ValueError(f"{missed[0]!r} ({len(missed)} in all) is not reached by a batch")
    if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
        told = (
            f"shape {tuple(value.shape)}, requires_grad={value.requires_grad}"
            if isinstance(value, Tensor)
            else type(value).__name__
        )
        raise ValueError(f"the loss must be a scalar that depends on the units, got {told}")


def _signed(outputs: Any, batch: Batch, generator: torch.Generator) -> Tensor:
    """The first floating-point output, real tokens only, summed with random signs."""
    rows = batch.real_outputs(outputs)
    signs = torch.randint(0, 2, rows.shape, generator=generator) * 2 - 1
    return (rows * signs.to(rows.device, rows.dtype)).sum()
