"""A prune step of ``pruning_type="obs"``: which units go, and weights that make up for them.

One pass over the calibration batches adds up the second moments of what every second linear (or
output projection) reads now, of all groups at once. Then, for each group on its own: structured OBS
removes live units one after the other (:mod:`slimkern.calibration.obs`), and least squares
(:mod:`slimkern.calibration.solve`) finds the weights of those that stay, and the bias where there
is one, with which the linear says best what it said before the step. As the target is the linear's
own output, ``W x + b``, no second pass is needed.

A group is measured as it stands before the step, not behind what the same step cuts further up.
Memory: one Gram matrix in fp64 per second linear, ``8 n²`` bytes for ``n`` live columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimkern.calibration.batches import Batch, read_batches, real_rows
from slimkern.calibration.moments import Moments
from slimkern.calibration.obs import Layer, Removal, remove
from slimkern.calibration.solve import least_squares
from slimkern.calibration.watch import evaluating, watched
from slimkern.cuts import spread
from slimkern.discovery.groups import Group
from slimkern.shards import is_sharded
from slimkern.track import Track

# What is kept of a dataloader: its first batches, up to the one that reaches the tokens.
CALIBRATION_TOKENS, CALIBRATION_BATCHES = 8192, 512
_CHUNK = 16  # columns that go at once between two updates of OBS

Keep = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Repair:
    """New values of a second linear: ``weight`` ``[out, columns]``, ``bias`` ``[out]`` or none."""

    linear: str
    columns: Tensor
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class ObsStep:
    """What a prune step found.

    Attributes:
        keep: group name -> the units that stay.
        repairs: the weights that go with them.
    """

    keep: dict[str, tuple[int, ...]]
    repairs: tuple[Repair, ...]

    @torch.no_grad()
    def write(self, model: nn.Module) -> None:
        """Put the repaired weights into the model's own tensors."""
        for repair in self.repairs:
            weight = model.get_parameter(f"{repair.linear}.weight")
            weight.index_copy_(1, repair.columns, repair.weight.to(weight.dtype))
            if repair.bias is not None:
                model.get_parameter(f"{repair.linear}.bias").copy_(repair.bias)


def first_batches(model: nn.Module, dataloader: Iterable[Any]) -> list[Any]:
    """The batches of a dataloader that are calibrated on: its first ``CALIBRATION_TOKENS`` tokens.

    Raises:
        TypeError: ``dataloader`` is no iterable of batches, or gives texts.
        ValueError: it holds no batch.
    """
    if isinstance(dataloader, (Mapping, str, Tensor)) or not hasattr(dataloader, "__iter__"):
        raise TypeError(
            f"dataloader must be an iterable of batches, got {type(dataloader).__name__}; a single "
            f"batch goes into a list"
        )
    kept: list[Any] = []
    tokens = 0
    for raw in dataloader:
        if isinstance(raw, str):
            raise TypeError("dataloader gives texts; accepted are batches as the model takes them")
        kept.append(raw)
        tokens += sum(batch.tokens for batch in read_batches(model, [raw]))
        if tokens >= CALIBRATION_TOKENS or len(kept) == CALIBRATION_BATCHES:
            break
    if not kept:
        raise ValueError("dataloader holds no batch: there is nothing to calibrate on")
    return kept


def checked(model: nn.Module, tracks: Iterable[Track], batches: Sequence[Any]) -> list[str]:
    """Whether these rules can do their prune steps; returns notes on what they lack.

    Raises:
        ValueError: there are no batches, or weights are sharded.
    """
    groups = [g for t in tracks if t.rule.needs_batches for g in t.groups]
    if not groups:
        return []
    for name in (f"{m.name}.weight" for g in groups for m in g.consumers):
        if is_sharded(model.get_parameter(name)):
            raise ValueError(
                f"pruning_type='obs' solves for whole weights, and {name!r} is sharded: prune "
                f"before fully_shard (start_step=0, end_step=0), or by another criterion"
            )
    if not batches:
        raise ValueError("pruning_type='obs' measures layers on calibration batches; there is none")
    tokens = sum(batch.tokens for batch in read_batches(model, batches))
    widest = max(g.num_units * m.unit_size for g in groups for m in g.consumers)
    if tokens >= widest:
        return []
    return [
        f"pruning_type='obs': the dataloader's first {len(batches)} batches hold {tokens} tokens, "
        f"fewer than the {widest} inputs of a layer; it can't be told well which are needed"
    ]


@torch.no_grad()
def obs_step(
    model: nn.Module, tracks: Sequence[Track], step: int, keep: Keep, batches: Sequence[Any]
) -> ObsStep:
    """What the prune step ``step`` of these rules removes, and the weights that make up for it.

    In the local scope every group loses its fraction, in the order of OBS. In the global scope
    groups are compared by what each further unit costs at the margin: by how much the lost fraction
    of the group's output energy grows per unit, made monotone along the group's order.

    Args:
        model: dense or masked, not changed.
        tracks: the rules with this prune step, of type ``obs``.
        step: completed optimizer steps.
        keep: group name -> the units that are kept so far.
        batches: the calibration batches.

    Raises:
        ValueError: a second linear is not reached, or activations are not finite.
    """
    tracks = [t for t in tracks if t.sparsity(step)]
    levels = {n: own for t in tracks for n, own in _levels(t, step, keep).items() if own}
    groups = [g for t in tracks for g in t.groups if g.name in levels]
    seen = _measured(model, groups, keep, read_batches(model, batches)) if groups else {}
    removals = {
        g.name: remove(_layers(model, g, keep, seen), levels[g.name], chunk=_CHUNK) for g in groups
    }
    chosen: dict[str, tuple[int, ...]] = {}
    for track in tracks:
        scores = {g.name: _marginal(g, keep[g.name], removals.get(g.name)) for g in track.groups}
        for name, units in track.highest(step, scores, keep).items():
            live = keep[name]
            cut = len(units) < len(live)
            stays = removals[name].keep(len(live), len(units)) if cut else range(len(live))
            chosen[name] = tuple(live[i] for i in stays)
    repairs = (r for g in groups for r in _repairs(model, g, keep[g.name], chosen[g.name], seen))
    return ObsStep(chosen, tuple(repairs))


def _levels(track: Track, step: int, keep: Keep) -> dict[str, list[int]]:
    """The widths at which the error of each group is wanted; none where it loses nothing."""
    flat = {g.name: torch.zeros(g.num_units) for g in track.groups}
    if track.rule.pruning_scope == "local":  # the width does not depend on scores
        widths = {n: len(units) for n, units in track.highest(step, flat, keep).items()}
        return {n: [w] if w < len(keep[n]) else [] for n, w in widths.items()}
    units = sum(g.num_units for g in track.groups)
    more = int(track.sparsity(step) * units) + 1 - (units - sum(len(keep[n]) for n in flat))
    found: dict[str, list[int]] = {}
    for group in track.groups:
        live = len(keep[group.name])
        floor = math.ceil(track.rule.min_sparsity_ratio_per_op * group.num_units)
        least = max(1, live - max(more, floor, 0))
        at_once = max(1, _CHUNK // max(m.unit_size for m in group.consumers))
        found[group.name] = [*range(live - at_once, least, -at_once), least] if least < live else []
    return found


def _measured(
    model: nn.Module, groups: Iterable[Group], keep: Keep, batches: Iterable[Batch]
) -> dict[str, Moments]:
    """Second moments of the live inputs of every second linear."""
    columns = dict(_live(model, groups, keep))
    found = {name: Moments(len(own), device=own.device) for name, own in columns.items()}

    def see(batch: Batch, name: str, x: Tensor) -> None:
        rows = real_rows(batch, x, name)
        if rows.shape[1] > len(columns[name]):  # not compact: its producers compute everything
            rows = rows[:, columns[name]]
        found[name].update(rows)

    with evaluating(model):
        for batch in batches:
            with watched(model, found, partial(see, batch)):
                batch.call(model)
    for name, moments in found.items():
        if not moments.tokens:
            raise ValueError(f"{name!r}: no token of the calibration batches reaches it")
    return found


def _live(model: nn.Module, groups: Iterable[Group], keep: Keep) -> Iterator[tuple[str, Tensor]]:
    for group in groups:
        units = torch.tensor(keep[group.name])
        for member in group.consumers:
            device = model.get_parameter(f"{member.name}.weight").device
            yield member.name, spread(units, member.unit_size, device)


def _layers(model: nn.Module, group: Group, keep: Keep, seen: Mapping[str, Moments]) -> list[Layer]:
    layers = []
    for member, (name, columns) in zip(group.consumers, _live(model, [group], keep)):
        linear = model.get_submodule(name)
        weight, moments = model.get_parameter(f"{name}.weight"), seen[name]
        hessian = moments.second() if linear.bias is None else moments.covariance()
        layers.append(Layer(weight[:, columns].double(), hessian, member.unit_size))
    return layers


def _marginal(group: Group, live: tuple[int, ...], removal: Removal | None) -> Tensor:
    """What each unit adds to the lost fraction when its turn comes; infinite if it never does."""
    scores = torch.full((group.num_units,), float("inf"))
    if removal is None:
        return scores
    above, highest = len(live), 0.0
    for level in sorted(removal.errors, reverse=True)[1:]:
        more = (removal.errors[level] - removal.errors[above]) / (above - level)
        highest = max(highest, more)
        for place in removal.order[len(live) - above : len(live) - level]:
            scores[live[place]] = highest
        above = level
    return scores


def _repairs(
    model: nn.Module,
    group: Group,
    live: tuple[int, ...],
    kept: tuple[int, ...],
    seen: Mapping[str, Moments],
) -> Iterator[Repair]:
    """The least-squares weights of a group's second linears for the units that stay."""
    if len(kept) == len(live):
        return
    places = {unit: place for place, unit in enumerate(live)}
    stays = torch.tensor([places[unit] for unit in kept])
    before = _live(model, [group], {group.name: live})
    after = _live(model, [group], {group.name: kept})
    for member, (name, columns), (_, own) in zip(group.consumers, before, after):
        weight, bias = (model.get_submodule(name)._parameters[p] for p in ("weight", "bias"))
        assert weight is not None
        within = spread(stays, member.unit_size, weight.device)
        moments = seen[name].through(weight[:, columns], bias).select(within)
        solved = least_squares(moments, weight[:, own], bias=bias is not None)
        yield Repair(name, own, solved.weight, solved.bias)
