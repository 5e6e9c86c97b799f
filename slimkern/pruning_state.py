"""The saved state of a pruning run, checked before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimkern.discovery.groups import Group
from slimkern.plan import PlanEntry


def read_keep(
    state: Mapping[str, Any], groups: Mapping[str, Group], weights: Mapping[str, Any]
) -> list[PlanEntry]:
    """What a state says of the units that stay.

    Args:
        state: what :meth:`slimkern.Pruning.state_dict` returned.
        groups: group name -> the group, of the run that is to go on.
        weights: linear name -> its weight, of all that the run scores.

    Raises:
        ValueError: it is no such state, or one of another model or configuration.
    """
    missing = {"step", "scores", "keep"} - set(state)
    if missing:
        raise ValueError(f"not a state of a pruning run: {sorted(missing)} missing")
    if set(state["keep"]) != set(groups):
        differing = sorted(set(state["keep"]) ^ set(groups))
        raise ValueError(f"the state is of other groups; only one side has {differing}")
    unknown = sorted(set(state["scores"]) - set(weights))
    if unknown:
        raise ValueError(f"the state has scores of layers that are not pruned: {unknown}")
    return [PlanEntry(g, tuple(int(i) for i in state["keep"][n])) for n, g in groups.items()]
