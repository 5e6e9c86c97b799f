"""What a model costs as a function of its groups' widths: parameters and multiply-accumulates.

Counting is exact and needs no forward. What a width costs in seconds is measured, in
:mod:`slimkern.latency`, and comes in the same form.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from slimkern.cuts import checked_cuts, cuts_of
from slimkern.discovery.groups import Group
from slimkern.plan import PlanEntry, SlimPlan


class Joint(NamedTuple):
    """A linear that is cut on both sides: a consumer of one group and a producer of the next.

    It costs ``per_pair * kept_a * kept_b``, which no sum of one table per group can say.
    """

    a: str
    b: str
    per_pair: float


@dataclass(frozen=True)
class Costs:
    """What a model costs: a fixed part and, for each group, a table over its width.

    The tables alone are what a search needs: ``fixed + sum of of(group, kept)`` is the cost, or
    where groups share a linear (``joint``; no transformer has them, a plain stack of linears does)
    an upper bound of it, equal at the full widths.

    Attributes:
        unit: ``"parameters"``, ``"MACs"`` or ``"seconds"``.
        fixed: what no group's width changes.
        tables: group name -> {units kept: cost}. The full width is the largest entry.
        joint: linears that two groups cut. Their tables hold half of such a linear each, cut on
            their own side only: ``kept_a * kept_b <= (kept_a * full_b + full_a * kept_b) / 2``.
    """

    unit: str
    fixed: float
    tables: Mapping[str, Mapping[int, float]]
    joint: tuple[Joint, ...] = field(default=())

    def of(self, group: str, kept: int) -> float:
        """The cost of a group at a width: its table's entry, or linear interpolation between the
        two entries around it.

        Raises:
            KeyError: there is no such group.
            ValueError: ``kept`` lies outside the table.
        """
        table = self._table(group)
        if kept in table:
            return table[kept]
        widths = sorted(table)
        if not widths[0] < kept < widths[-1]:
            raise ValueError(
                f"kept is {kept} for {group!r}; its table of {self.unit} runs from {widths[0]} to "
                f"{widths[-1]} units"
            )
        after = bisect_left(widths, kept)
        low, high = widths[after - 1], widths[after]
        part = (kept - low) / (high - low)
        return table[low] + part * (table[high] - table[low])

    def total(self, widths: Mapping[str, int]) -> float:
        """The cost of the model with these widths: ``{group name: units kept}``.

        Groups that are not named keep their full width.

        Raises:
            KeyError: a name is no group's.
            ValueError: a width lies outside its group's table.
        """
        for name in widths:
            self._table(name)
        kept = {name: widths.get(name, max(table)) for name, table in self.tables.items()}
        total = self.fixed + sum(self.of(name, k) for name, k in kept.items())
        for a, b, per_pair in self.joint:
            halves = (kept[a] * max(self.tables[b]) + max(self.tables[a]) * kept[b]) / 2
            total += per_pair * (kept[a] * kept[b] - halves)
        return total

    def _table(self, group: str) -> Mapping[int, float]:
        if group not in self.tables:
            raise KeyError(f"no group is named {group!r}; groups: {sorted(self.tables)}")
        return self.tables[group]


def count_parameters(model: nn.Module, groups: Iterable[Group]) -> Costs:
    """How many parameters a model has, for any widths of its groups: exact.

    ``total(widths)`` is ``sum(p.numel() for p in slim.parameters())`` of the model that
    :func:`slimkern.slim_` leaves at these widths: biases and per-unit parameters between included,
    tied parameters once. Embeddings, norms and everything that no group cuts are in ``fixed``.

    Raises:
        SurgeryError: the groups do not fit the model.
        ValueError: a group is named twice.
    """
    groups = tuple(groups)
    named = dict(model.named_parameters(remove_duplicate=False))
    owners = _owners(model, groups)
    by_parameter: dict[nn.Parameter, dict[int, str]] = {}
    for name, parameter in named.items():
        cut = by_parameter.setdefault(parameter, {})
        # What is tied is cut alike, or refused by surgery: the first place speaks for all.
        for dim, group in owners.get(name, {}).items():
            cut.setdefault(dim, group)
    terms = [_Term(p.numel(), tuple(cut.values())) for p, cut in by_parameter.items()]
    return _assemble("parameters", groups, terms)


def count_macs(
    model: nn.Module, groups: Iterable[Group], shape: tuple[int, int] = (1, 128)
) -> Costs:
    """How many multiply-accumulates one forward takes, for any widths of the model's groups.

    With ``shape = (batch, s)``: every ``nn.Linear`` counts ``batch * s * in * out``, as if it were
    called once on every token, and each head of a group adds its two attention products,
    ``batch * s² * (size of its query + size of its value)``, which is ``2 * s² * head_dim``
    (Kwon et al., A Fast Post-Training Pruning Framework for Transformers, 2022). One MAC is two
    floating-point operations.

    Not counted: biases, norms, activations, softmax, embedding look-ups, convolutions and other
    modules that are no ``nn.Linear``, and the attention products of heads that are in no group.
    Overcounted: linears that see fewer tokens, as a pooler or a classifier on the first token does.
    Undercounted: linears that are called several times. All of these are outside of the groups, so
    that differences between widths are exact.

    Args:
        model: the model; nothing is run.
        groups: its groups, as :func:`slimkern.discover` found them.
        shape: sequences per batch, and tokens per sequence.

    Raises:
        SurgeryError: the groups do not fit the model.
        ValueError: a group is named twice, or ``shape`` holds a number under 1.
    """
    batch, tokens = shape
    if batch < 1 or tokens < 1:
        raise ValueError(f"shape is {shape}; accepted: (batch, tokens), both at least 1")
    groups = tuple(groups)
    owners = _owners(model, groups)
    terms = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            cut = owners.get(f"{name}.weight" if name else "weight", {})
            terms.append(_Term(batch * tokens * module.weight.numel(), tuple(cut.values())))
    for group in groups:
        if group.kind == "mha":
            sizes = [m.unit_size for m in group.producers if m.role == "query"]
            sizes += [m.unit_size for m in group.consumers]
            products = batch * tokens**2 * sum(sizes) * group.num_units
            terms.append(_Term(products, (group.name,)))
    return _assemble("MACs", groups, terms)


class _Term(NamedTuple):
    """A cost at full widths, proportional to the width of each of ``groups`` (none, one or two)."""

    size: int
    groups: tuple[str, ...]


def _owners(model: nn.Module, groups: tuple[Group, ...]) -> dict[str, dict[int, str]]:
    """Parameter name -> {dimension: the group that cuts it}."""
    names = [g.name for g in groups]
    if len(set(names)) != len(names):
        raise ValueError(f"groups names a group twice: {names}")
    narrowest = [PlanEntry(g, (0,)) for g in groups]
    checked_cuts(model, SlimPlan(tuple(narrowest)))
    owners: dict[str, dict[int, str]] = {}
    for entry in narrowest:
        for name, dim, _ in cuts_of(entry):
            owners.setdefault(name, {})[dim] = entry.group.name
    return owners


def _assemble(unit: str, groups: tuple[Group, ...], terms: Iterable[_Term]) -> Costs:
    """Sum the terms up: a slope per group (its cost per unit), the joint ones, the rest."""
    full = {g.name: g.num_units for g in groups}
    fixed, joint = 0.0, []
    slope: dict[str, float] = dict.fromkeys(full, 0.0)
    square: dict[str, float] = dict.fromkeys(full, 0.0)
    for size, cut in terms:
        if not cut:
            fixed += size
        elif len(cut) == 1:
            slope[cut[0]] += size // full[cut[0]]
        elif cut[0] == cut[1]:
            square[cut[0]] += size // full[cut[0]] ** 2
        else:
            a, b = cut
            slope[a] += size // full[a] / 2
            slope[b] += size // full[b] / 2
            joint.append(Joint(a, b, size // (full[a] * full[b])))
    tables = {
        name: dict(_polynomial(slope[name], square[name], units)) for name, units in full.items()
    }
    return Costs(unit, fixed, tables, tuple(joint))


def _polynomial(slope: float, square: float, units: int) -> Iterator[tuple[int, float]]:
    for kept in range(1, units + 1):
        yield kept, slope * kept + square * kept**2
