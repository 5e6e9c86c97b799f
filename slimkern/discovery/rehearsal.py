"""A second forward, with every group one unit smaller: the last check of what was found.

Axes say that units are independent of each other. They can't see what a forward computes from a
*count* in plain Python: ``h / h.shape[-1]``, or a ``view`` with the number of heads from a
configuration that no cut reaches. So the forward runs once more with each group cut by one unit. It
must run through, and every operation must be the same and compute with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from slimkern.discovery.axes import extent
from slimkern.discovery.forward import forward
from slimkern.discovery.groups import Discovery, Group, Refusal
from slimkern.discovery.inputs import Inputs
from slimkern.discovery.record import Step, Trace
from slimkern.discovery.trace import Recorder

# What a forward raises when a size does not fit it.
_FAILURES = (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)


def rehearse(model: nn.Module, inputs: Inputs, trace: Trace, found: Discovery) -> Discovery:
    """``found`` without the groups that a smaller forward speaks against; these are refused."""
    groups = [g for g in found.groups if _live(g, trace) > 1]
    refused: dict[str, str] = {}
    while groups:
        blame = _differences(model, inputs, trace, groups)
        if not blame:
            break
        refused.update(blame)
        groups = [g for g in groups if g.name not in blame]
    if not refused:
        return found
    kept = tuple(g for g in found.groups if g.name not in refused)
    return Discovery(kept, (*found.refused, *(Refusal(*row) for row in refused.items())))


def _live(group: Group, trace: Trace) -> int:
    """Units that take part in the forward (fewer than all where the model is masked)."""
    first = group.producers[0]
    return trace.linears[first.name].out.size // first.unit_size


def _differences(
    model: nn.Module, inputs: Inputs, trace: Trace, groups: Sequence[Group]
) -> dict[str, str]:
    """Reasons against groups, by name; empty where the smaller forward is the same."""
    recorder = Recorder()
    failure = ""
    linears = _stand_ins(trace, groups)
    change = partial(_shrink, model, trace, groups)
    try:
        forward(model, inputs, recorder, linears, fake=trace.fake, change=change)
    except _FAILURES as error:
        failure = f"the forward fails with fewer units, {recorder.here()}: {_first_line(error)}"
    blame: dict[str, str] = {}
    for i, (before, after) in enumerate(zip(trace.steps, recorder.steps)):
        if before == after:
            continue
        reason = f"{before.name!r} {before.place} depends on the number of units"
        if before.name != after.name:
            reason = (
                f"the forward depends on the number of units: with fewer it calls {after.name!r} "
                f"where it called {before.name!r}"
            )
        for group in _at_work(groups, trace.steps, i):
            blame.setdefault(group.name, reason)
        if before.name != after.name:
            return blame
    if failure or len(trace.steps) != len(recorder.steps):
        reason = failure or "the forward takes another course with fewer units"
        for group in _at_work(groups, trace.steps, len(recorder.steps)):
            blame.setdefault(group.name, reason)
    return blame


def _at_work(groups: Sequence[Group], steps: Sequence[Step], i: int) -> list[Group]:
    """The groups between whose linears step ``i`` lies; all of them where it lies in none."""
    where: dict[str, int] = {s.place: n for n, s in enumerate(steps) if s.name == "linear"}
    inside = [
        g
        for g in groups
        if min(where[m.name] for m in g.producers) < i <= max(where[m.name] for m in g.consumers)
    ]
    return inside or list(groups)


def _stand_ins(trace: Trace, groups: Sequence[Group]) -> dict[str, Callable[[Tensor], Tensor]]:
    """For each linear, a forward that checks and makes shapes only, of smaller groups."""
    taken = {c.name: extent(c.taken) for c in trace.called()}
    made = {c.name: c.out.size for c in trace.called()}
    for group in groups:
        for member in group.producers:
            made[member.name] -= member.unit_size
        for member in group.consumers:
            taken[member.name] -= member.unit_size
    return {name: partial(_shapes, name, taken[name], made[name]) for name in made}


def _shapes(name: str, taken: int, made: int, x: Tensor) -> Tensor:
    if x.shape[-1] != taken:
        raise ValueError(f"{name!r} gets {x.shape[-1]} input features, not {taken}")
    return x.new_zeros(*x.shape[:-1], made)


def _shrink(model: nn.Module, trace: Trace, groups: Sequence[Group]) -> None:
    """Set what a smaller group changes besides its linears (undone by the caller)."""
    for group in groups:
        for between in group.between:
            owner, _, leaf = between.name.rpartition(".")
            parameters = model.get_submodule(owner)._parameters
            whole = parameters[leaf]
            assert whole is not None
            shape = list(whole.shape)
            shape[between.dim] -= between.unit_size
            parameters[leaf] = nn.Parameter(
                torch.zeros(shape, dtype=whole.dtype, device=whole.device), requires_grad=False
            )
        for a in group.attributes:
            module = model.get_submodule(a.module)
            module.__dict__[a.name] = a.per_unit * (_live(group, trace) - 1)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
