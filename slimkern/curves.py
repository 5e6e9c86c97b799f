"""Error curves: what a model loses when one group alone gets narrower, for every width of a grid.

Within a group, structured OBS tells how the error of the layer's output grows. Between groups these
errors are made comparable by one measurement each: the group alone is slimmed to about half and
repaired, and the change of the model's outputs is held against the error of the layer's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from slimkern.calibration.batches import Batch, spread_over
from slimkern.calibration.moments import Moments
from slimkern.calibration.obs import remove
from slimkern.calibration.walk import DenseWalk, Progress, Site, Walk
from slimkern.copies import sharing_copy
from slimkern.cuts import linear_of
from slimkern.discovery.groups import Group
from slimkern.layerwise import Method, columns, obs_layer, solved
from slimkern.plan import PlanEntry, SlimPlan
from slimkern.surgery import repair_, slim_

Curve = Mapping[int, float]
_PROBE_TOKENS = 2048


def error_curves(
    walk: Walk,
    dense: nn.Module,
    levels: Mapping[str, tuple[int, ...]],
    method: Method,
    progress: Progress,
) -> dict[str, Curve]:
    """``{group name: {units kept: error}}``, in order of execution; errors add up over groups.

    An error is the change of the model's outputs, ``‖out - dense out‖²`` over real tokens, relative
    to their variance. It is measured at about half the width and follows the error of the layer's
    own output elsewhere.

    Args:
        walk: sites and batches; only the dense model is run.
        dense: the dense model.
        levels: group name -> the widths wanted.
        method: how layers are repaired.
        progress: ``progress(stage, done, total)``.

    Raises:
        ValueError: outputs of the model hold no numbers, or activations are not finite.
    """
    whole = [walk.batches[i] for i in walk.every]
    outputs = _Outputs(dense, [whole[i] for i in spread_over(whole, _PROBE_TOKENS)])
    dense_walk = DenseWalk(walk, walk.sites, walk.few)
    waiting: dict[str, list[tuple[Site, Moments]]] = {}
    curves: dict[str, Curve] = {}
    for done, site in enumerate(walk.sites):
        progress("error curves", done, len(walk.sites))
        group = site.group
        parts = waiting.setdefault(group.name, [])
        parts.append((site, dense_walk.visit(site)))
        if len(parts) == len(group.consumers):
            del waiting[group.name]
            curves[group.name] = _curve(dense, group, parts, levels[group.name], method, outputs)
    dense_walk.close()
    progress("error curves", len(walk.sites), len(walk.sites))
    return curves


def _curve(
    dense: nn.Module,
    group: Group,
    parts: list[tuple[Site, Moments]],
    levels: tuple[int, ...],
    method: Method,
    outputs: _Outputs,
) -> Curve:
    layers = [obs_layer(m, linear_of(dense, s.member), s, method) for s, m in parts]
    removal = remove(layers, levels, damping=method.damping, chunk=method.chunk)
    below = [n for n in levels if n < group.num_units]
    if not below:
        return removal.errors
    probe = min(below, key=lambda n: abs(n - group.num_units / 2))
    keep = removal.keep(group.num_units, probe)
    model = slim_(sharing_copy(dense), SlimPlan((PlanEntry(group, keep),)))
    for site, moments in parts:
        linear = linear_of(model, site.member)
        solution = solved(moments.select(columns(site, keep)), linear, method)
        repair_(model, site.name, solution.weight, solution.bias)
    own = removal.errors[probe]
    weight = outputs.change(model) / own if own > 0 else 0.0
    return {width: weight * error for width, error in removal.errors.items()}


class _Outputs:
    """A model's outputs on a few batches, to hold those of its copies against."""

    def __init__(self, model: nn.Module, batches: list[Batch]) -> None:
        self.batches = batches
        self.dense = [self._of(model, batch) for batch in batches]
        count = sum(len(rows) for rows in self.dense)
        mean = sum(rows.sum(0, dtype=torch.float64) for rows in self.dense) / count
        self.energy = sum(float((rows - mean).square().sum()) for rows in self.dense)

    @torch.no_grad()
    def change(self, model: nn.Module) -> float:
        """``‖out - dense out‖²`` relative to the variance of the dense outputs."""
        off = 0.0
        for batch, before in zip(self.batches, self.dense):
            off += float((self._of(model, batch).double() - before).square().sum())
        return off / self.energy if self.energy > 0 else off

    @torch.no_grad()
    def _of(self, model: nn.Module, batch: Batch) -> Tensor:
        return batch.real_outputs(batch.call(model))
