"""``mask_`` and ``slim_``: the only code, with ``fuse.py``, that sets attributes on a user's model.

Both apply a :class:`~slimkern.plan.SlimPlan`. Everything is checked before anything is changed, so
that a refusal leaves the model as it was.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from slimkern.cuts import SurgeryError, checked_cuts, cut, linear_of, spread
from slimkern.discovery.groups import Group, Member
from slimkern.mask_blocks import REFUSED, fitting_blocks, with_told
from slimkern.masks import carried_masks, is_masked
from slimkern.nn import MaskedLinear, install_block, release_unmasked_blocks
from slimkern.optimizer_state import check_owner, check_state, move_state
from slimkern.plan import PlanEntry, SlimPlan, compose, inside

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
    consumers' columns of masked units are set to zero, and are zero in every state dict, so that a
    plain save of the model *is* the masked model. Where a per-unit parameter lies between,
    producers stay complete. Known encoder layers and FFNs become blocks
    (:func:`slimkern.masked_blocks`). Calling it again replaces the masks of the groups that the
    plan names; a plan that keeps everything lifts them (the zeros
    remain, in plain linears). The masks are left on the model as ``model.mask_plan``.

    Args:
        model: the model, changed in place.
        plan: what stays.

    Returns:
        the model.

    Raises:
        SurgeryError: a module of the plan is missing, is no plain linear or has another size, or
            a parameter of it is tied to one that would stay; nothing has been changed then.
    """
    checked_cuts(model, plan)
    blocks, refused = fitting_blocks(model, plan)
    for entry in plan.entries:
        group, keep = entry.group, torch.tensor(entry.keep)
        whole = len(entry.keep) == group.num_units
        for member in group.consumers:
            linear = MaskedLinear.adopt(linear_of(model, member))
            index = spread(keep, member.unit_size, linear.weight.device)
            linear.cols = None if whole else index
            linear.gather = bool(group.between)
            linear.zero_masked()
        if group.between:
            continue
        for member in group.producers:
            linear = MaskedLinear.adopt(linear_of(model, member))
            index = spread(keep, member.unit_size, linear.weight.device)
            linear.rows = None if whole else index
        _set_counts(model, entry)
    for module, block in blocks:
        install_block(module, block)
    _release(model, plan)
    _remember(model, plan.entries)
    if is_masked(model) and refused:
        setattr(model, REFUSED, with_told(model, refused))
    return model


def _remember(model: nn.Module, entries: Iterable[PlanEntry] = ()) -> None:
    """Keep ``model.mask_plan`` up to date, for :func:`carried_masks` to find."""
    named = {e.group.name: e for e in (*carried_masks(model), *entries)}
    model.mask_plan = SlimPlan(tuple(named.values()))  # type: ignore[assignment]
    still = carried_masks(model)
    del model.mask_plan
    if still.entries:
        model.mask_plan = still  # type: ignore[assignment]


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


def slim_(
    model: nn.Module, plan: SlimPlan, optimizer: torch.optim.Optimizer | None = None
) -> nn.Module:
    """Remove units for good: smaller weights in ordinary modules, nothing else changed.

    The result equals the model masked by the same plan, to rounding. Dtype, device,
    ``requires_grad``, gradients, ties and hooks stay; the plan is left on the model as
    ``model.slim_plan`` (composed with an earlier one), where :func:`slimkern.save` reads it, and
    its part on every Hugging Face model inside, so that each can be saved.

    Args:
        model: the model, dense or masked, changed in place.
        plan: what stays.
        optimizer: its parameters and their state are exchanged for the smaller ones, so that
            training goes on. An optimizer that is not passed keeps the old tensors.

    Returns:
        the model.

    Raises:
        SurgeryError: the plan does not fit, or a parameter can't be cut (as one that is sharded).
        ValueError: the optimizer is not the model's, or has state that can't be cut. In either
            case nothing has been changed.
    """
    named, cuts = checked_cuts(model, plan, whole=True)
    noted = _noted(model, plan)
    if optimizer is not None:
        check_owner(optimizer, model.parameters())
        check_state(optimizer, {named[name] for name in cuts})
    steps = {named[name]: cuts[name] for name in cuts}  # what is tied, and cut alike, stays tied
    fresh = {parameter: cut(parameter, steps[parameter]) for parameter in steps}
    # From here on nothing can fail: every new tensor exists.
    for name in cuts:
        _assign(model, name, fresh[named[name]])
    if optimizer is not None:
        move_state(optimizer, {old: (new, steps[old]) for old, new in fresh.items()})
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
    for module, part, whole in noted:
        module.slim_plan = whole  # type: ignore[assignment]
        _update_config(module, part)
    return model


def repair_(model: nn.Module, name: str, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """Give the linear ``name`` new weights, in new parameters of the dtype that it had.

    Args:
        model: changed in place.
        name: of a plain linear.
        weight: ``[out, in]``.
        bias: ``[out]``; ``None`` leaves the one that is there. A linear without one gets one.

    Raises:
        SurgeryError: the linear is missing, of another make, or of another size.
    """
    linear = linear_of(model, Member(name, 1, "consumer"))
    old = linear.weight
    if weight.shape != old.shape or (bias is not None and bias.shape != old.shape[:1]):
        raise SurgeryError(
            f"{name!r}: new weights are {tuple(weight.shape)}, the linear's {tuple(old.shape)}"
        )
    parts = [("weight", weight)] if bias is None else [("weight", weight), ("bias", bias)]
    for part, _ in parts:
        _check_untied(model, linear, name, part)
    for part, value in parts:
        fresh = value.detach().to(old.device, old.dtype, copy=True).contiguous()
        _assign(model, f"{name}.{part}", nn.Parameter(fresh, old.requires_grad))
    return model


def _check_untied(model: nn.Module, linear: nn.Linear, name: str, part: str) -> None:
    """Refuse to give a parameter other values where it is another module's too."""
    mine = linear._parameters[part]
    for other, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is mine and mine is not None and module is not linear:
                raise SurgeryError(
                    f"{f'{name}.{part}'!r} is tied to {f'{other}.{key}'!r}, which a repair would "
                    f"not follow"
                )


def note_errors_(model: nn.Module, plan: SlimPlan) -> nn.Module:
    """Write the errors of a plan's groups, and its notes, into the plans that ``slim_`` left on the
    model and on the models inside."""
    for name, module in model.named_modules():
        told: SlimPlan | None = vars(module).get("slim_plan")
        if told is None:
            continue
        errors = {e.group.name: e.error for e in inside(plan, name)}
        entries = [replace(e, error=errors.get(e.group.name, e.error)) for e in told]
        notes = told.notes + (plan.notes if module is model else ())
        module.slim_plan = SlimPlan(tuple(entries), notes)
    return model


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
    release_unmasked_blocks(model)
    if not is_masked(model):
        vars(model).pop(REFUSED, None)


def _set_counts(model: nn.Module, entry: PlanEntry) -> None:
    for a in entry.group.attributes:
        setattr(model.get_submodule(a.module), a.name, a.per_unit * len(entry.keep))


def _noted(model: nn.Module, plan: SlimPlan) -> list[tuple[nn.Module, SlimPlan, SlimPlan]]:
    """Who is to know of the cut: the model, and every Hugging Face model in it of its own part,
    as it may be saved by itself. With what is cut of it now, and in all."""
    noted = []
    for name, module in model.named_modules():
        part = inside(plan, name)
        if module is model or (part.entries and is_hugging_face(module)):
            earlier: SlimPlan = vars(module).get("slim_plan", SlimPlan(()))
            noted.append((module, part, compose(earlier, part)))
    return noted


def is_hugging_face(model: nn.Module) -> bool:
    """Whether the model is transformers' own kind; never imports transformers to find out."""
    module = sys.modules.get("transformers.modeling_utils")
    return module is not None and isinstance(model, module.PreTrainedModel)


def _update_config(model: nn.Module, plan: SlimPlan) -> None:
    """Let the configuration say the FFN width, where one number can say it.

    A number of heads is not written: encoders derive the size of a head from it, so that the
    modules, not the configuration, are where the heads of a slim model are counted.
    """
    config: Any = getattr(model, "config", None)
    widths: dict[str, set[int]] = {}
    for entry in plan:
        if entry.group.kind == "ffn":
            for field in FFN_FIELDS:
                if getattr(config, field, None) == entry.group.num_units:
                    widths.setdefault(field, set()).add(len(entry.keep))
    for field, found in widths.items():
        if len(found) == 1 and not _left_out(model, plan, getattr(config, field)):
            setattr(config, field, found.pop())


def _left_out(model: nn.Module, plan: SlimPlan, width: int) -> bool:
    """Whether a layer of ``width`` was not cut: one whose name differs by its number alone."""
    cut_now = {m.name for e in plan for m in e.group.consumers}
    alike = {re.sub(r"\d+", "*", name) for name in cut_now}
    return any(
        isinstance(m, nn.Linear) and m.in_features == width and name not in cut_now
        for name, m in model.named_modules()
        if re.sub(r"\d+", "*", name) in alike
    )
