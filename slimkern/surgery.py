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
from slimkern.masks import carried_masks, masked_plan
from slimkern.nn import MaskedLinear
from slimkern.optimizer_state import check_owner, check_state, move_state
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
    lifts them (the zeros remain, in plain linears). The masks are left on the model as
    ``model.mask_plan``.

    Args:
        model: the model, changed in place.
        plan: what stays.

    Returns:
        the model.

    Raises:
        SurgeryError: a module of the plan is missing, is no plain linear or has another size, or
            a parameter of it is tied to one that would stay; nothing has been changed then.
    """
    _checked_cuts(model, plan)
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
    _release(model, plan)
    _remember(model, plan.entries)
    return model


def _remember(model: nn.Module, entries: Iterable[PlanEntry] = ()) -> None:
    """Keep ``model.mask_plan`` up to date, for :func:`carried_masks` to find."""
    groups = {e.group.name: e.group for e in (*carried_masks(model), *entries)}
    plan = masked_plan(model, groups.values())
    vars(model).pop("mask_plan", None)
    if plan.entries:
        model.mask_plan = plan  # type: ignore[assignment]


def zero_masked_columns(linear: MaskedLinear) -> None:
    """Set the columns that ``linear`` does not read to zero, as optimizers with momentum or noise
    may have moved them."""
    if linear.cols is None:
        return
    dead = torch.ones(linear.in_features, dtype=torch.bool, device=linear.weight.device)
    dead[linear.cols] = False
    with torch.no_grad():
        linear.weight.masked_fill_(dead, 0)


@contextmanager
def unmasked(model: nn.Module, groups: Iterable[Group]) -> Iterator[nn.Module]:
    """For the time of a ``with``: these groups of a masked model compute densely, zeros in place.

    The outputs are those of the masked model. Masks and the integer attributes that count units
    come back at the end, whatever happens.
    """
    groups = tuple(groups)
    sides = [(m, "rows") for g in groups for m in g.producers]
    sides += [(m, "cols") for g in groups for m in g.consumers]
    linears = [(model.get_submodule(m.name), side) for m, side in sides]
    masks = [(x, s, getattr(x, s)) for x, s in linears if isinstance(x, MaskedLinear)]
    counts = [(model.get_submodule(a.module), a, g) for g in groups for a in g.attributes]
    before = [getattr(module, a.name) for module, a, _ in counts]
    try:
        for linear, side, _ in masks:
            setattr(linear, side, None)
        for module, a, group in counts:
            setattr(module, a.name, a.per_unit * group.num_units)
        yield model
    finally:
        for linear, side, index in masks:
            setattr(linear, side, index)
        for (module, a, _), value in zip(counts, before):
            setattr(module, a.name, value)


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside what ``torch.compile`` returned, which computes with it; or the model."""
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


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
        SurgeryError: the plan does not fit, or a parameter can't be cut.
        ValueError: the optimizer is not the model's, or has state that can't be cut. In either
            case nothing has been changed.
    """
    named, cuts = _checked_cuts(model, plan)
    earlier: SlimPlan = vars(model).get("slim_plan", SlimPlan(()))
    whole = compose(earlier, plan)
    if optimizer is not None:
        check_owner(optimizer, model.parameters())
        check_state(optimizer, {named[name] for name in cuts})
    fresh = {name: cut(named[name], steps) for name, steps in cuts.items()}
    # From here on nothing can fail: every new tensor exists.
    for name, parameter in fresh.items():
        _assign(model, name, parameter)
    if optimizer is not None:
        move_state(optimizer, {named[n]: (fresh[n], cuts[n]) for n in cuts})
    for entry in plan.entries:
        for members, side in ((entry.group.consumers, "cols"), (entry.group.producers, "rows")):
            for member in members:
                linear = model.get_submodule(member.name)
                if isinstance(linear, MaskedLinear):
                    setattr(linear, side, None)
    _release(model, plan)
    _remember(model)
    for entry in plan.entries:
        _set_counts(model, entry)
    _update_config(model, plan)
    model.slim_plan = whole  # type: ignore[assignment]
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


def _checked_cuts(
    model: nn.Module, plan: SlimPlan
) -> tuple[dict[str, nn.Parameter], dict[str, list[tuple[int, Tensor]]]]:
    """The parameters by name, and the cuts that a plan means for them; or a refusal."""
    if uncompiled(model) is not model:
        raise SurgeryError(
            "the model is what torch.compile returned: pass the module that was compiled "
            "(model._orig_mod), with a plan for it; the compiled one follows"
        )
    cuts: dict[str, list[tuple[int, Tensor]]] = {}
    for entry in plan.entries:
        _check_entry(model, entry)
        for name, dim, index in cuts_of(entry):
            cuts.setdefault(name, []).append((dim, index))
    named = dict(model.named_parameters(remove_duplicate=False))
    check_parameters(named, cuts)
    return named, cuts


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
        except (AttributeError, IndexError) as error:
            raise SurgeryError(
                f"{between.name!r}: the model has no such parameter with a dimension {between.dim}"
            ) from error
        if have != group.num_units * between.unit_size:
            raise SurgeryError(
                f"{between.name!r}: dimension {between.dim} has {have} entries, the plan speaks "
                f"of {group.num_units} units of {between.unit_size}"
            )
    for a in group.attributes:
        try:
            value = getattr(model.get_submodule(a.module), a.name)
        except AttributeError:
            value = None
        if not isinstance(value, int) or isinstance(value, bool):
            raise SurgeryError(f"{a.module}.{a.name}: the model has no such integer attribute")


def _assign(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    owner._parameters[leaf] = parameter
    for (kind, parameter_name, dim), attribute in _SIZES.items():
        if isinstance(owner, kind) and leaf == parameter_name:
            setattr(owner, attribute, parameter.shape[dim])


def _release(model: nn.Module, plan: SlimPlan) -> None:
    """Masked linears of the plan's groups that have no mask left become plain ones."""
    for entry in plan.entries:
        for member in (*entry.group.consumers, *entry.group.producers):
            linear = model.get_submodule(member.name)
            if isinstance(linear, MaskedLinear) and linear.rows is None and linear.cols is None:
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
