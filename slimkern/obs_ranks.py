"""A prune step of ``pruning_type="obs"`` in several processes: rank 0 finds, all do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from slimkern.obs_step import Keep, ObsStep, Repair, obs_step
from slimkern.parallel import Ranks
from slimkern.track import Track


def on_first(
    ranks: Ranks,
    model: nn.Module,
    tracks: Sequence[Track],
    step: int,
    keep: Keep,
    batches: Sequence[Any],
) -> ObsStep:
    """:func:`obs_step` on rank 0 with its batches, and what it found on every rank.

    Solutions of other processors would differ in their last bits, and the weights of the ranks with
    them.

    Raises:
        RuntimeError: on the other ranks, where it fails on rank 0.
    """
    found = ObsStep({}, ())
    if not tracks:
        return found
    with ranks.together(f"calibrating at step {step}"):
        if not ranks.rank:
            found = obs_step(model, tracks, step, keep, batches)
    if ranks.alone:
        return found
    told = [(r.linear, r.columns.tolist(), r.bias is not None) for r in found.repairs]
    chosen, told = json.loads(ranks.first(json.dumps([found.keep, told])))
    own = {r.linear: r for r in found.repairs}
    repairs = tuple(_received(model, own.get(name), name, *rest) for name, *rest in told)
    ranks.spread_(t for r in repairs for t in (r.weight, r.bias) if t is not None)
    return ObsStep({n: tuple(units) for n, units in chosen.items()}, repairs)


def _received(
    model: nn.Module, own: Repair | None, name: str, columns: list[int], biased: bool
) -> Repair:
    """A repair as it is sent: in the dtypes of the model; empty where it is still to come."""
    weight, bias = model.get_parameter(f"{name}.weight"), None
    index = torch.tensor(columns, dtype=torch.int64, device=weight.device)
    if biased:
        bias = torch.empty_like(model.get_parameter(f"{name}.bias"), requires_grad=False)
    values = weight.new_empty(weight.shape[0], len(columns))
    if own is not None:
        values.copy_(own.weight)
        if bias is not None and own.bias is not None:
            bias.copy_(own.bias)
    return Repair(name, index, values, bias)
