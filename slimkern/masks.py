"""What is masked in a model and what was cut from it: read from modules and from notes on them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from torch import nn

from slimkern.discovery.groups import Group
from slimkern.nn import BlockMasked, MaskedLinear
from slimkern.plan import PlanEntry, SlimPlan, compose, within


def is_masked(model: nn.Module) -> bool:
    """Whether any module of the model is in the masked state."""
    return any(isinstance(m, (MaskedLinear, BlockMasked)) for m in model.modules())


def masked_plan(model: nn.Module, groups: Iterable[Group]) -> SlimPlan:
    """The masks that a model carries, as a plan: an entry for each group that is masked."""
    entries = []
    for group in groups:
        first = group.consumers[0]
        linear = model.get_submodule(first.name)
        if isinstance(linear, MaskedLinear) and linear.cols is not None:
            keep = linear.cols[:: first.unit_size] // first.unit_size
            entries.append(PlanEntry(group, tuple(keep.tolist())))
    return SlimPlan(tuple(entries))


def carried_masks(model: nn.Module) -> SlimPlan:
    """The masks whose groups ``mask_`` noted as ``mask_plan``, on the model or a module inside it.

    Integer attributes follow the masks, so that not every group can be read off a masked model
    again. What was noted and does not hold any more is left out: a module of the group was slimmed
    or replaced, or its mask was lifted.
    """
    modules = dict(model.named_modules())
    noted: dict[str, PlanEntry] = {}
    for name, module in modules.items():
        for entry in within(vars(module).get("mask_plan", SlimPlan(())), name):
            noted.setdefault(entry.group.name, entry)
    holding: list[PlanEntry] = []
    for entry in noted.values():
        first = entry.group.consumers[0]
        linear = modules.get(first.name)
        width = entry.group.num_units * first.unit_size
        if not isinstance(linear, MaskedLinear) or linear.weight.shape[1] != width:
            continue
        on_meta = linear.cols is not None and linear.cols.is_meta  # there are no values to read
        holding += [entry] if on_meta else masked_plan(model, [entry.group]).entries
    return SlimPlan(tuple(holding))


def masked_beside(model: nn.Module, plan: SlimPlan) -> list[str]:
    """The masked linears that belong to no group of a plan, by name."""
    spoken_of = {
        (m.name, side)
        for e in plan.entries
        for members, side in ((e.group.producers, "rows"), (e.group.consumers, "cols"))
        for m in members
    }
    return [
        name
        for name, linear in model.named_modules()
        if isinstance(linear, MaskedLinear)
        for side in ("rows", "cols")
        if getattr(linear, side) is not None and (name, side) not in spoken_of
    ]


def told_plan(model: nn.Module) -> SlimPlan:
    """The cuts that ``slim_`` noted as ``slim_plan`` on a model and on modules inside it, as one.

    A module may have been slimmed before it was put into another, or with it.

    Raises:
        ValueError: what is noted is not all of what happened to a layer.
    """
    told: dict[str, list[PlanEntry]] = {}
    notes: dict[str, None] = {}
    for name, module in model.named_modules():
        part = within(vars(module).get("slim_plan", SlimPlan(())), name)
        notes.update(dict.fromkeys(part.notes))
        for entry in part:
            told.setdefault(entry.group.name, []).append(entry)
    whole: list[PlanEntry] = []
    for entries in told.values():
        # From the full width down; one entry may have in it already what another tells.
        entries.sort(key=lambda e: (-e.group.num_units, len(e.keep)))
        plan = SlimPlan((entries[0],))
        for entry in entries[1:]:
            if entry.group.num_units <= len(plan.entries[0].keep):
                plan = compose(plan, SlimPlan((entry,)))
        whole += plan.entries
    return SlimPlan(tuple(whole), tuple(notes))


def owned_elements(model: nn.Module, group: Group) -> int:
    """Weights and biases of a group that its units own."""
    made = (model.get_submodule(m.name).parameters(recurse=False) for m in group.producers)
    read = (model.get_parameter(f"{m.name}.weight") for m in group.consumers)
    return sum(p.numel() for p in (*chain.from_iterable(made), *read))
