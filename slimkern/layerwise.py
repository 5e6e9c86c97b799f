"""One pass from the first layer to the last: choose what goes, remove it, repair what stays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimkern.calibration.moments import Moments
from slimkern.calibration.obs import Layer, Removal, remove
from slimkern.calibration.ranking import unit_scores
from slimkern.calibration.solve import Solution, as_it_was, least_squares
from slimkern.calibration.walk import DenseWalk, Progress, Site, Walk
from slimkern.cuts import linear_of, spread
from slimkern.discovery.groups import Group
from slimkern.plan import PlanEntry, SlimPlan
from slimkern.surgery import repair_, slim_

CRITERIA = ("obs", "magnitude", "activation", "fluctuation", "fisher")
REPAIRS = ("least_squares", "bias", "none")


@dataclass(frozen=True)
class Method:
    """How units are chosen and layers repaired.

    Attributes:
        criterion: one of ``CRITERIA``.
        repair: ``least_squares``; ``bias``: only the bias makes up for the mean of what went;
            ``none``.
        sequential: each layer sees the slimmed ones before it; otherwise all see the dense model.
        ones_row: a bias that is there is solved for with the weights.
        add_bias: a second linear without a bias gets one.
        chunk: columns that structured OBS removes at once.
        damping: of structured OBS, a fraction of the mean second moment of the inputs.
        ridge: of least squares, the same.
    """

    criterion: str = "obs"
    repair: str = "least_squares"
    sequential: bool = True
    ones_row: bool = True
    add_bias: bool = False
    chunk: int = 16
    damping: float = 0.01
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion={self.criterion!r}; accepted: {', '.join(CRITERIA)}")
        if self.repair not in REPAIRS:
            raise ValueError(f"repair={self.repair!r}; accepted: {', '.join(REPAIRS)}")
        if self.chunk < 1:
            raise ValueError(f"chunk={self.chunk}; accepted: at least 1")
        for name in ("damping", "ridge"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}; accepted: a positive number")


class Layerwise:
    """Slims a copy of a model, group by group in order of execution.

    Args:
        walk: both models and the batches.
        widths: group name -> units that stay.
        method: how.
        scores: group name -> scores per unit, for criteria that are not read off a layer's inputs
            (``fisher``).
        progress: ``progress(stage, done, total)``.
    """

    def __init__(
        self,
        walk: Walk,
        widths: Mapping[str, int],
        method: Method,
        scores: Mapping[str, Tensor] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.walk = walk
        self.widths = widths
        self.method = method
        self.scores = scores or {}
        self.progress = progress or (lambda stage, done, total: None)
        self.keep: dict[str, tuple[int, ...]] = {}
        self.errors: dict[str, list[float]] = {}
        self.notes: list[str] = []

    def run(self) -> SlimPlan:
        """Slim the walk's copy; returns what was done, in order of execution."""
        shared = [s for s in self.walk.sites if len(s.group.consumers) > 1]
        self._choose_shared(shared)
        total = len(self.walk.sites)
        for done, site in enumerate(self.walk.sites):
            self.progress("slim and repair", done, total)
            if self.method.sequential:
                self._after_the_slim_ones(site)
        if not self.method.sequential:
            self._beside_the_dense_ones(total)
        self.progress("slim and repair", total, total)
        groups = {s.group.name: s.group for s in self.walk.sites}
        entries = [
            PlanEntry(g, self.keep[n], sum(self.errors[n]) / len(self.errors[n]))
            for n, g in groups.items()
        ]
        return SlimPlan(tuple(entries), tuple(self.notes))

    def _after_the_slim_ones(self, site: Site) -> None:
        self.walk.aim(site)
        if site.group.name not in self.keep:
            whole = self.widths[site.group.name] == site.group.num_units
            self._cut(site.group, None if whole else self.walk.look(site), site)
        self._repair(site, self.walk.arrive(site))
        self.walk.leave(site)

    def _beside_the_dense_ones(self, total: int) -> None:
        """Each layer by itself: its inputs and its target are the dense model's."""
        dense = DenseWalk(self.walk, self.walk.sites, self.walk.every)
        for done, site in enumerate(self.walk.sites):
            self.progress("slim and repair", done, total)
            moments = dense.visit(site)
            if site.group.name not in self.keep:
                self._cut(site.group, moments, site)
            self._repair(site, moments.select(columns(site, self.keep[site.group.name])))
        dense.close()

    def _choose_shared(self, sites: list[Site]) -> None:
        """Groups that several layers share: chosen by all of them, in the dense model."""
        if not sites:
            return
        dense = DenseWalk(self.walk, sites, self.walk.few)
        found: dict[str, list[tuple[Site, Moments]]] = {}
        for done, site in enumerate(sites):
            self.progress("look at shared heads", done, len(sites))
            found.setdefault(site.group.name, []).append((site, dense.visit(site)))
        dense.close()
        for parts in found.values():
            self._cut_by(parts[0][0].group, [(m, s) for s, m in parts])

    def _cut(self, group: Group, moments: Moments | None, site: Site) -> None:
        parts = [] if moments is None else [(moments, site)]
        self._cut_by(group, parts)

    def _cut_by(self, group: Group, parts: list[tuple[Moments, Site]]) -> None:
        width = self.widths[group.name]
        if width == group.num_units or not parts:
            self.keep[group.name] = tuple(range(group.num_units))
            return
        self._note_few(group, parts[0][0])
        self.keep[group.name] = self._chosen(group, width, parts)
        slim_(self.walk.slim, SlimPlan((PlanEntry(group, self.keep[group.name]),)))
        for member in group.producers:
            rows = spread(torch.tensor(self.keep[group.name]), member.unit_size)
            self.walk.narrow(member.name, rows)

    def _chosen(
        self, group: Group, width: int, parts: list[tuple[Moments, Site]]
    ) -> tuple[int, ...]:
        """The units that stay, sorted."""
        if self.method.criterion == "obs":
            layers = [
                obs_layer(m, self._linear(s), s, self.method, spent=self.method.sequential)
                for m, s in parts
            ]
            return self._removal(layers, [width]).keep(group.num_units, width)
        if self.method.criterion == "fisher":
            scores = self.scores[group.name]
        else:
            each = [
                unit_scores(
                    self.method.criterion, self._linear(s).weight.detach(), m, s.member.unit_size
                )
                for m, s in parts
            ]
            # Layers that share their units differ in scale: each has the same say.
            scores = torch.stack([e / e.sum().clamp_min(1e-300) for e in each]).sum(0)
        best = scores.argsort(descending=True, stable=True)[:width]
        return tuple(sorted(best.tolist()))

    def _removal(self, layers: list[Layer], levels: list[int]) -> Removal:
        return remove(layers, levels, damping=self.method.damping, chunk=self.method.chunk)

    def _repair(self, site: Site, moments: Moments) -> None:
        if self._untouched(site.group):
            self.errors.setdefault(site.group.name, []).append(0.0)
            return
        solution = solved(moments, self._linear(site), self.method)
        if self.method.repair != "none":
            repair_(self.walk.slim, site.name, solution.weight, solution.bias)
        self.errors.setdefault(site.group.name, []).append(solution.error)

    def _untouched(self, group: Group) -> bool:
        """Whether a layer computes what the dense one does: neither it nor one before it is cut."""
        units = {site.group.name: site.group.num_units for site in self.walk.sites}
        seen = self.keep if self.method.sequential else {group.name}
        return all(len(self.keep[name]) == units[name] for name in seen)

    def _linear(self, site: Site) -> nn.Linear:
        return linear_of(self.walk.slim, site.member)

    def _note_few(self, group: Group, moments: Moments) -> None:
        width = group.num_units * group.consumers[0].unit_size
        if moments.tokens < width:
            self.notes.append(
                f"{group.name}: {moments.tokens} tokens choose among {width} channels; give more "
                f"calibration data, at least as many tokens as channels"
            )


def obs_layer(
    moments: Moments, linear: nn.Linear, site: Site, method: Method, *, spent: bool = False
) -> Layer:
    """What structured OBS reads of a layer: about the mean where its bias makes up for means.

    Where the moments are ``spent`` with it, their memory, the largest thing there is, serves.
    """
    hessian = moments.into_covariance() if spent else moments.covariance()
    if not fits_bias(linear, method):
        hessian.addr_(moments.mean_x, moments.mean_x)
    return Layer(linear.weight.detach().double(), hessian, site.member.unit_size, spent=True)


def fits_bias(linear: nn.Linear, method: Method) -> bool:
    """Whether a repair finds a bias for a linear."""
    wanted = method.ones_row if linear.bias is not None else method.add_bias
    return wanted and method.repair != "none"


def solved(moments: Moments, linear: nn.Linear, method: Method) -> Solution:
    """The repair of a linear by a method, from the moments of its inputs and targets."""
    weight, old = linear.weight.detach().double(), linear.bias
    solve = fits_bias(linear, method)
    if method.repair == "least_squares":
        if old is not None and not solve:  # the bias stays: the weights aim at the rest
            moments = moments.less(old.detach().double())
        return least_squares(moments, weight, bias=solve, ridge=method.ridge)
    return as_it_was(moments, weight, None if old is None else old.detach(), bias=solve)


def columns(site: Site, keep: tuple[int, ...]) -> Tensor:
    """The input columns of a site's linear that belong to kept units."""
    return spread(torch.tensor(keep), site.member.unit_size)
