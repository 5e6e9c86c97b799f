"""Which of the groups found a pruning rule means: kinds, names, regular expressions, exclusions."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import nn

from slimkern.config import PruningRule
from slimkern.discovery.groups import Discovery, Group

_KIND = {"channelx1": "ffn", "mha": "mha"}
_WHAT = {"ffn": "FFN (two linears with elementwise operations between)", "mha": "self-attention"}
_SHOWN = 12  # refusals in an error message


def targets(
    model: nn.Module, found: Discovery, rule: PruningRule
) -> tuple[tuple[Group, ...], list[str]]:
    """As :func:`matching`; a rule that means no group raises."""
    chosen, notes = matching(model, found, rule)
    if not chosen:
        kind = _KIND[rule.pattern]
        asked = f" that op_names={list(rule.op_names)} selects" if rule.op_names else ""
        excluded = rule.excluded_op_names
        less = f", excluded_op_names={list(excluded)} left out" if excluded else ""
        raise ValueError(
            f"pattern {rule.pattern!r}: no {_WHAT[kind]}{asked}{less} in this "
            f"{described(model)}\n{reasons(found)}"
        )
    return chosen, notes


def matching(
    model: nn.Module, found: Discovery, rule: PruningRule
) -> tuple[tuple[Group, ...], list[str]]:
    """The groups that a rule means, and a note on every exclusion that excludes nothing."""
    kind = _KIND[rule.pattern]
    modules = {n for n, _ in model.named_modules()}
    fitting = [g for g in found.groups if g.kind == kind and _is_type(model, g, rule)]
    chosen = [g for g in fitting if not g.is_head]
    if rule.op_names:
        chosen = [g for g in fitting if hits(rule.op_names, _selectable(g), modules)]
    notes = []
    for entry in rule.excluded_op_names:
        if not any(hits((entry,), (name,), modules) for name in modules):
            notes.append(f"excluded_op_names: {entry!r} is the name of no module")
    excluded = rule.excluded_op_names
    chosen = [g for g in chosen if not hits(excluded, _all_names(g), modules)]
    return tuple(chosen), notes


def entry_for(name: str) -> str:
    """The ``op_names`` entry that means the module ``name`` alone: its name, if need be escaped."""
    try:
        re.compile(name)
    except re.error:
        return f"^{re.escape(name)}$"
    return name


def hits(entries: Iterable[str], names: Iterable[str], modules: set[str]) -> bool:
    """Whether an entry means one of the names: the module and what is in it where it is a module's
    whole name, a regular expression searched in the names otherwise."""
    names = tuple(names)
    for entry in entries:
        if entry in modules:
            if any(name == entry or name.startswith(entry + ".") for name in names):
                return True
        elif any(re.search(entry, name) for name in names):
            return True
    return False


def _selectable(group: Group) -> tuple[str, ...]:
    """The names by which ``op_names`` selects a group: the second linear's, or all of a head's."""
    return tuple(m.name for m in group.consumers) if group.kind == "ffn" else _all_names(group)


def _all_names(group: Group) -> tuple[str, ...]:
    return tuple(m.name for m in (*group.producers, *group.consumers))


def _is_type(model: nn.Module, group: Group, rule: PruningRule) -> bool:
    classes = type(model.get_submodule(group.consumers[0].name)).__mro__
    return any(part in c.__name__ for c in classes for part in rule.pruning_op_types)


def described(model: nn.Module) -> str:
    """The model's class, and a word on the linears of another make that it is built of."""
    name = type(model).__name__
    if any(type(m).__name__ == "Conv1D" for m in model.modules()):
        return f"{name}: its layers are Conv1D (transformers), which are not supported yet"
    return name


def reasons(found: Discovery) -> str:
    """What was refused and what was found, for an error message."""
    lines = [f"  refused {r.name}: {r.reason}" for r in found.refused]
    if len(lines) > _SHOWN:
        lines[_SHOWN:] = [f"  ... and {len(lines) - _SHOWN} more; discover(model) lists all"]
    lines += [f"  found {g.name} ({g.kind}{', model head' if g.is_head else ''})" for g in found]
    return "\n".join(lines) or "  no linear layers in a row were seen"


def refused_zeros(model: nn.Module, found: Discovery) -> list[str]:
    """Refused linears that read columns which are all zero: somebody wanted those to go."""
    lines, modules = [], dict(model.named_modules())
    for refusal in found.refused:
        module = modules.get(refusal.name)  # or a parameter's name
        if isinstance(module, nn.Linear) and bool((module.weight == 0).all(0).any()):
            lines.append(f"  refused {refusal.name}: {refusal.reason}")
    return lines


def check_device(model: nn.Module, device: torch.device | str | None) -> None:
    """Refuse a device that the model is not on."""
    if device is None:
        return
    wanted = torch.device(device)
    have = {p.device for p in model.parameters()}
    if any(d.type != wanted.type or wanted.index not in (None, d.index) for d in have):
        raise ValueError(f"device={str(device)!r}, but the model is on {sorted(map(str, have))}")
