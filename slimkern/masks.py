"""Which masks a model carries: read from its modules, and from what ``mask_`` noted on them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from slimkern.discovery.groups import Group
from slimkern.nn import MaskedLinear
from slimkern.plan import PlanEntry, SlimPlan, within


def is_masked(model: nn.Module) -> bool:
    """Whether any module of the model is in the masked state."""
    return any(isinstance(m, MaskedLinear) for m in model.modules())


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
    groups: dict[str, Group] = {}
    for name, module in modules.items():
        plan = vars(module).get("mask_plan")
        if isinstance(plan, SlimPlan):
            for entry in within(plan, name):
                groups.setdefault(entry.group.name, entry.group)
    holding = []
    for group in groups.values():
        first = group.consumers[0]
        linear = modules.get(first.name)
        width = group.num_units * first.unit_size
        if isinstance(linear, MaskedLinear) and linear.weight.shape[1] == width:
            holding.append(group)
    return masked_plan(model, holding)


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
