"""``mask_`` and ``slim_``: the only code, with ``fuse.py``, that sets attributes on a user's model.

Both apply a :class:`~slimkern.plan.SlimPlan`. Everything is checked before anything is changed, so
that a refusal leaves the model as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimkern.cuts import SurgeryError, check_parameters, cut, cuts_of, spread
from slimkern.discovery.groups import Group, Member
from slimkern.nn import MaskedLinear
from slimkern.optimizer_state import check_state, move_state
from slimkern.plan import PlanEntry, SlimPlan, compose

# Sizes that a module states about its own parameters: (class, parameter, dim) -> attribute.
_SIZES = {
    (nn.Linear, "weight", 0): "out_features",
    (nn.Linear, "weight", 1): "in_features",
    (nn.Embedding, "weight", 1): "embedding_dim",
    (nn.PReLU, "weight", 0): "num_parameters",
}
# The width of the FFN in a configuration, by the names that transformers' configurations use.
FFN_FIELDS = ("intermediate_size", "hidden_dim", "ffn_dim", "d_ff", "n_inner")


def mask_(model: nn.Module, plan: SlimPlan) -> nn.Module:
    """Put a model in the masked state: full-size weights, compute on the kept units only.

    Producers compute the kept rows, consumers the kept columns (gathered inside the op); the
    consumers' columns of masked units are set to zero, so that a plain save of the model *is* the
    masked model. Where a per-unit parameter lies between, producers stay complete. Calling it
    again replaces the masks of the groups that the plan names; a plan that keeps everything
    lifts them (the zeros remain). The masks are left on the model as ``model.mask_plan``.

    Args:
        model: the model, changed in place.
        plan: what stays.

    Returns:
        the model.

    Raises:
        SurgeryError: a module of the plan is missing, is no plain linear or has another size;
            nothing has been changed then.
    """
    for entry in plan.entries:
        _check_entry(model, entry)
    for entry in plan.entries:
        group, keep = entry.group, torch.tensor(entry.keep)
        whole = len(entry.keep) == group.num_units
        for member in group.consumers:
            linear = MaskedLinear.adopt(_linear(model, member))
            index = spread(keep, member.unit_size, linear.weight.device)
            linear.cols = None if whole else index
            linear.gather = bool(group.between)
            zero_masked_columns(linear)
        if group.between:
            continue
        for member in group.producers:
            linear = MaskedLinear.adopt(_linear(model, member))
            index = spread(keep, member.unit_size, linear.weight.device)
            linear.rows = None if whole else index
        _set_counts(model, entry)
    _remember(model, plan.entries)
    return model


def _remember(model: nn.Module, entries: Iterable[PlanEntry], forget: Iterable[str] = ()) -> None:
    """Keep ``model.mask_plan`` up to date: the groups that are masked, for who did not mask them.

    Integer attributes follow the masks, so that the groups can't be read off a masked model.
    """
    earlier: SlimPlan = vars(model).get("mask_plan", SlimPlan(()))
    named = {e.group.name: e for e in (*earlier.entries, *entries)}
    for name in forget:
        named.pop(name, None)
    if named:
        model.mask_plan = SlimPlan(tuple(named.values()))  # type: ignore[assignment]
    else:
        vars(model).pop("mask_plan", None)


def zero_masked_columns(linear: MaskedLinear) -> None:
    """Set the columns that ``linear`` does not read to zero, as optimizers with momentum or noise
    may have moved them."""
    if linear.cols is None:
        return
    dead = torch.ones(linear.in_features, dtype=torch.bool, device=linear.weight.device)
    dead[linear.cols] = False
    with torch.no_grad():
        linear.weight.masked_fill_(dead, 0)


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


def is_masked(model: nn.Module) -> bool:
    """Whether any module of the model is in the masked state."""
    return any(isinstance(m, MaskedLinear) for m in model.modules())


@contextmanager
def unmasked(model: nn.Module, groups: Iterable[Group] = ()) -> Iterator[nn.Module]:
    """For the time of a ``with``: a masked model computing densely, its zeros in place.

    The outputs are those of the masked model. Masks come back at the end, whatever happens.
    Integer attributes that count units are dense meanwhile when their groups are given.
    """
    masks = {m: (m.rows, m.cols) for m in model.modules() if isinstance(m, MaskedLinear)}
    counts = [(model.get_submodule(a.module), a, g) for g in groups for a in g.attributes]
    before = [getattr(module, a.name) for module, a, _ in counts]
    try:
        for linear in masks:
            linear.rows = linear.cols = None
        for module, a, group in counts:
            setattr(module, a.name, a.per_unit * group.num_units)
        yield model
    finally:
        for linear, (rows, cols) in masks.items():
            linear.rows, linear.cols = rows, cols
        for (module, a, _), value in zip(counts, before):
            setattr(module, a.name, value)


def slim_(
    model: nn.Module, plan: SlimPlan, optimizer: torch.optim.Optimizer | None = None
) -> nn.Module:
    """Remove units for good: smaller weights in ordinary modules, nothing else changed.

    The result equals the model masked by the same plan, to rounding. Dtype, device,
    ``requires_grad``, gradients, ties and hooks stay; the plan is left on the model as
    ``model.slim_plan`` (composed with an earlier one), where :func:`slimkern.save` reads it.

    Args:
        model: the model, dense or masked, changed in place.
        plan: what stays.
        optimizer: its parameters and their state are exchanged for the smaller ones, so that
            training goes on. An optimizer that is not passed keeps the old tensors.

    Returns:
        the model.

    Raises:
        SurgeryError: the plan does not fit, or a parameter can't be cut; nothing has been
            changed then.
    """
    cuts: dict[str, list[tuple[int, Tensor]]] = {}
    for entry in plan.entries:
        _check_entry(model, entry)
        for name, dim, index in cuts_of(entry):
            cuts.setdefault(name, []).append((dim, index))
    named = dict(model.named_parameters(remove_duplicate=False))
    check_parameters(named, cuts)
    if optimizer is not None:
        check_state(optimizer, {named[name] for name in cuts})
    fresh = {name: cut(named[name], steps) for name, steps in cuts.items()}
    # From here on nothing can fail: every new tensor exists.
    for name, parameter in fresh.items():
        _assign(model, name, parameter)
    if optimizer is not None:
        move_state(optimizer, {named[n]: (fresh[n], cuts[n]) for n in cuts})
    _release(model, plan)
    _remember(model, (), forget=[e.group.name for e in plan.entries])
    for entry in plan.entries:
        _set_counts(model, entry)
    _update_config(model, plan)
    earlier = getattr(model, "slim_plan", None)
    model.slim_plan = plan if earlier is None else compose(earlier, plan)  # type: ignore[assignment]
    return model


def _linear(model: nn.Module, member: Member) -> nn.Linear:
    """The linear module of a member, or a refusal that names it."""
    try:
        module = model.get_submodule(member.name)
    except AttributeError as error:
        raise SurgeryError(f"{member.name!r}: the model has no such module") from error
    if type(module) not in (nn.Linear, MaskedLinear):
        raise SurgeryError(
            f"{member.name!r}: only a plain nn.Linear can be cut, this is {type(module).__name__}"
        )
    for name in ("weight", "bias"):
        if name not in module._parameters:
            raise SurgeryError(f"{member.name!r}: its {name} is parametrized or no parameter")
    return module  # type: ignore[return-value]


def _check_entry(model: nn.Module, entry: PlanEntry) -> None:
    group = entry.group
    for dim, members in ((0, group.producers), (1, group.consumers)):
        for member in members:
            have = _linear(model, member).weight.shape[dim]
            want = group.num_units * member.unit_size
            if have != want:
                side = ("rows", "columns")[dim]
                raise SurgeryError(
                    f"{member.name!r}: the plan speaks of {group.num_units} units of "
                    f"{member.unit_size} {side}, but its weight has {have} {side}"
                )
    for between in group.between:
        try:
            have = model.get_parameter(between.name).shape[between.dim]
        except AttributeError as error:
            raise SurgeryError(f"{between.name!r}: the model has no such parameter") from error
        if have != group.num_units * between.unit_size:
            raise SurgeryError(
                f"{between.name!r}: dimension {between.dim} has {have} entries, the plan speaks "
                f"of {group.num_units} units of {between.unit_size}"
            )
    for attribute in group.attributes:
        if not isinstance(getattr(model.get_submodule(attribute.module), attribute.name), int):
            raise SurgeryError(f"{attribute.module}.{attribute.name} is no integer")


def _assign(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    owner._parameters[leaf] = parameter
    for (kind, parameter_name, dim), attribute in _SIZES.items():
        if isinstance(owner, kind) and leaf == parameter_name:
            setattr(owner, attribute, parameter.shape[dim])


def _release(model: nn.Module, plan: SlimPlan) -> None:
    """Masked linears of the plan's groups become plain ones; their other side may stay masked."""
    for entry in plan.entries:
        sides = ((entry.group.consumers, "cols"), (entry.group.producers, "rows"))
        for members, side in sides:
            for member in members:
                linear = model.get_submodule(member.name)
                if isinstance(linear, MaskedLinear):
                    setattr(linear, side, None)
                    if linear.rows is None and linear.cols is None:
                        linear.release()


def _set_counts(model: nn.Module, entry: PlanEntry) -> None:
    for a in entry.group.attributes:
        setattr(model.get_submodule(a.module), a.name, a.per_unit * len(entry.keep))


def _update_config(model: nn.Module, plan: SlimPlan) -> None:
    """Let the configuration say the FFN width, where one number can say it.

    A number of heads is not written: encoders derive the size of a head from it, so that the
    modules, not the configuration, are where the heads of a slim model are counted.
    """
    config: Any = getattr(model, "config", None)
    widths = {len(e.keep) for e in plan.entries if e.group.kind == "ffn"}
    before = {e.group.num_units for e in plan.entries if e.group.kind == "ffn"}
    if config is None or len(widths) != 1 or len(before) != 1:
        return
    dense, slim = before.pop(), widths.pop()
    still_dense = sum(isinstance(m, nn.Linear) and m.in_features == dense for m in model.modules())
    for name in FFN_FIELDS:
        if getattr(config, name, None) == dense and not still_dense:
            setattr(config, name, slim)
