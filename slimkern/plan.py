"""The plan: which units of which groups stay, from scores or from what is zero already.

A :class:`SlimPlan` is frozen data. It carries the description of its groups, so that it can be
applied to a fresh model without tracing it again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from slimkern.discovery.groups import Group, Kind
from slimkern.selection import round_width, select

_FORMAT, _VERSION = "slimkern-plan", 1


@dataclass(frozen=True)
class PlanEntry:
    """What stays of one group.

    Attributes:
        group: the group, as discovery described it.
        keep: sorted indices of the kept units in the **original** layer.
        error: after a one-shot repair, the fraction of its target's variance that the layer
            misses on the calibration data; ``None`` where nothing was repaired.
    """

    group: Group
    keep: tuple[int, ...]
    error: float | None = None

    def __post_init__(self) -> None:
        name, n = self.group.name, self.group.num_units
        if not self.keep:
            raise ValueError(f"plan for {name!r} keeps no unit; at least one of {n} must stay")
        if list(self.keep) != sorted(set(self.keep)):
            raise ValueError(f"plan for {name!r}: keep must be sorted and without repeats")
        if self.keep[0] < 0 or self.keep[-1] >= n:
            raise ValueError(
                f"plan for {name!r}: keep runs from {self.keep[0]} to {self.keep[-1]}, "
                f"but the group has units 0 to {n - 1}"
            )

    @property
    def sparsity(self) -> float:
        """The fraction of units removed."""
        return 1 - len(self.keep) / self.group.num_units


@dataclass(frozen=True)
class SlimPlan:
    """The decision: which units of which groups stay. Frozen, and stable as JSON text.

    Attributes:
        entries: one entry per group that the plan speaks of.
        notes: what the selection could not do as asked (a cut that rounding cancelled, a target
            that floors made unreachable), one sentence each.
    """

    entries: tuple[PlanEntry, ...]
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        names = [e.group.name for e in self.entries]
        if len(set(names)) != len(names):
            raise ValueError(f"plan names a group twice: {names}")

    def __getitem__(self, name: str) -> PlanEntry:
        for entry in self.entries:
            if entry.group.name == name:
                return entry
        raise KeyError(f"the plan has no group {name!r}")

    def __iter__(self) -> Iterator[PlanEntry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def to_json(self) -> str:
        """The plan as JSON text: the same plan gives the same text."""
        data = {
            "format": _FORMAT,
            "version": _VERSION,
            "groups": [_row(e) for e in self.entries],
            "notes": list(self.notes),
        }
        return json.dumps(data, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> SlimPlan:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: the text is no plan, or one of an unknown version.
        """
        try:
            data = json.loads(text)
            if data["format"] != _FORMAT or data["version"] != _VERSION:
                raise ValueError(
                    f"not a plan this version reads: format {data['format']!r}, "
                    f"version {data['version']!r}; expected {_FORMAT!r}, {_VERSION}"
                )
            entries = []
            for row in data["groups"]:
                _check_row(row)
                keep = tuple(int(i) for i in row.pop("keep"))
                error = row.pop("error", None)
                entries.append(PlanEntry(Group.from_dict(row), keep, error))
            if not all(isinstance(note, str) for note in data["notes"]):
                raise ValueError(f"not a slimkern plan: notes are {data['notes']!r}")
            return cls(tuple(entries), tuple(data["notes"]))
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a slimkern plan: {error!r}") from error


def _row(entry: PlanEntry) -> dict[str, Any]:
    row = {**entry.group.to_dict(), "keep": list(entry.keep)}
    return row if entry.error is None else {**row, "error": entry.error}


_TYPES: dict[str, type] = {
    **dict.fromkeys(("name", "module", "role"), str),
    **dict.fromkeys(("num_units", "unit_size", "per_unit", "dim"), int),
    **dict.fromkeys(("producers", "consumers", "between", "attributes", "keep"), list),
    "is_head": bool,
    "error": float,
}


def _check_row(row: dict[str, Any]) -> None:
    """Refuse values in a group's JSON data that are of another type, or no size."""
    for key, value in row.items():
        wrong = key in _TYPES and type(value) is not _TYPES[key]
        wrong |= type(value) is int and value < (key != "dim")
        wrong |= key == "kind" and value not in get_args(Kind)
        wrong |= key == "keep" and not all(type(i) is int for i in value)
        if wrong:
            raise ValueError(f"not a slimkern plan: {key} is {value!r}")
        if isinstance(value, list) and key != "keep":
            for inner in value:
                _check_row(inner)


def compose(first: SlimPlan, then: SlimPlan) -> SlimPlan:
    """The plan that does in one cut what ``first`` and, on its result, ``then`` do.

    Kept indices of the result are those of the original layers.

    Raises:
        ValueError: ``then`` speaks of a layer of another width than ``first`` leaves.
    """
    later = {e.group.name: e for e in then.entries}
    entries = []
    for entry in first.entries:
        second = later.pop(entry.group.name, None)
        if second is not None and second.group.num_units != len(entry.keep):
            raise ValueError(
                f"{entry.group.name!r}: one plan leaves {len(entry.keep)} units, the next speaks "
                f"of {second.group.num_units}; what came between is not in these plans"
            )
        keep = entry.keep if second is None else tuple(entry.keep[i] for i in second.keep)
        error = entry.error if second is None else second.error
        entries.append(PlanEntry(entry.group, keep, error))
    return SlimPlan((*entries, *later.values()), first.notes + then.notes)


def within(plan: SlimPlan, prefix: str) -> SlimPlan:
    """The plan with the names that its modules have in a model that contains theirs as ``prefix``.

    ``""`` is the model itself, and changes nothing.
    """
    if not prefix:
        return plan
    moved = (_renamed(e, lambda name: f"{prefix}.{name}" if name else prefix) for e in plan)
    return SlimPlan(tuple(moved), plan.notes)


def inside(plan: SlimPlan, prefix: str) -> SlimPlan:
    """The inverse of :func:`within`: what a plan says of groups that lie in ``prefix`` entirely."""
    if not prefix:
        return plan
    dot = f"{prefix}."

    def whole(g: Group) -> bool:
        places = [m.name for m in (*g.producers, *g.consumers)] + [b.name for b in g.between]
        places += [a.module + "." for a in g.attributes]
        return all(name.startswith(dot) for name in places)

    moved = (
        _renamed(e, lambda name: "" if name == prefix else name.removeprefix(dot))
        for e in plan
        if whole(e.group)
    )
    return SlimPlan(tuple(moved))


def _renamed(entry: PlanEntry, rename: Callable[[str], str]) -> PlanEntry:
    g = entry.group
    group = replace(
        g,
        name=rename(g.name),
        producers=tuple(replace(m, name=rename(m.name)) for m in g.producers),
        consumers=tuple(replace(m, name=rename(m.name)) for m in g.consumers),
        between=tuple(replace(b, name=rename(b.name)) for b in g.between),
        attributes=tuple(replace(a, module=rename(a.module)) for a in g.attributes),
    )
    return PlanEntry(group, entry.keep, entry.error)


def make_plan(
    groups: Iterable[Group],
    scores: Mapping[str, Tensor],
    ffn_sparsity: float = 0.5,
    mha_sparsity: float = 0.5,
    scope: str = "local",
    multiple_of: int = 32,
    min_units: int = 1,
) -> SlimPlan:
    """A plan from scores: :func:`select` for FFN channels and for heads.

    Args:
        groups: what :func:`slimkern.discover` returned, or some of its groups. A group without
            scores is left alone.
        scores: ``{group name: 1-D tensor of num_units scores}``, as ``importance`` returns.
        ffn_sparsity, mha_sparsity: the fraction of channels and of heads to remove, in [0, 1).
        scope: ``local`` or ``global``.
        multiple_of: widths of FFN layers are rounded up to it; heads are not rounded.
        min_units: units that stay in every group.

    Raises:
        ValueError: an argument is out of range, or scores do not fit a group.
        KeyError: scores name a group that is not there.
    """
    by_name = {g.name: g for g in groups}
    unknown = sorted(set(scores) - set(by_name))
    if unknown:
        raise KeyError(f"scores name no group of these: {unknown}; groups: {sorted(by_name)}")
    for name, score in scores.items():
        if tuple(score.shape) != (by_name[name].num_units,):
            raise ValueError(
                f"scores of {name!r} have shape {tuple(score.shape)}, "
                f"expected ({by_name[name].num_units},)"
            )
    kept: dict[str, tuple[int, ...]] = {}
    notes: tuple[str, ...] = ()
    for kind, sparsity, multiple in (("ffn", ffn_sparsity, multiple_of), ("mha", mha_sparsity, 1)):
        own = {n: s for n, s in scores.items() if by_name[n].kind == kind}
        keep, more = select(own, sparsity, scope=scope, multiple_of=multiple, min_units=min_units)
        kept.update(keep)
        notes += more
    entries = tuple(PlanEntry(g, kept[n]) for n, g in by_name.items() if n in kept)
    return SlimPlan(entries, notes)


def dead_units(model: nn.Module, group: Group) -> Tensor:
    """Which units of a group contribute nothing, as a bool vector [num_units].

    True where every consumer's columns are exactly zero: that alone makes the removal exact.
    """
    dead = torch.ones(group.num_units, dtype=torch.bool)
    for member in group.consumers:
        weight = model.get_parameter(f"{member.name}.weight")
        columns = (weight.detach() == 0).all(dim=0)
        dead &= columns.view(group.num_units, member.unit_size).all(dim=1).cpu()
    return dead


def plan_from_zeros(model: nn.Module, groups: Iterable[Group], multiple_of: int = 32) -> SlimPlan:
    """The plan that removes what is already zero in a model.

    FFN widths are rounded up to ``multiple_of``: dead channels of lowest index stay to reach it,
    and one dead unit stays where a layer is all zero.
    """
    if multiple_of < 1:
        raise ValueError(f"round_multiplier must be at least 1, got {multiple_of}")
    entries, notes = [], []
    for group in groups:
        dead = dead_units(model, group)
        live = max(1, group.num_units - int(dead.sum()))
        multiple = multiple_of if group.kind == "ffn" else 1
        width = round_width(live, multiple, group.num_units)
        if dead.any() and width == group.num_units and group.num_units > 1:
            notes.append(
                f"{group.name}: rounding {live} live of {group.num_units} units up to a multiple "
                f"of {multiple} cancels the whole cut"
            )
        spare = torch.nonzero(dead).flatten()[: width - (group.num_units - int(dead.sum()))]
        keep = ~dead
        keep[spare] = True
        entries.append(PlanEntry(group, tuple(torch.nonzero(keep).flatten().tolist())))
    return SlimPlan(tuple(entries), tuple(notes))
