"""What a plan means for a model's parameters: whether it fits, what stays, the smaller tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from slimkern.discovery.groups import Member
from slimkern.nn import FusedModule, MaskedLinear
from slimkern.parallel import unwrapped
from slimkern.plan import PlanEntry, SlimPlan
from slimkern.shards import WAY_OUT, first_sharded, resharded_


class SurgeryError(ValueError):
    """A plan can't be applied to a model exactly; names the module and the reason."""


def spread(keep: Tensor, unit_size: int, device: torch.device | None = None) -> Tensor:
    """Unit indices -> the indices of their entries, ``unit_size`` consecutive ones per unit."""
    if unit_size > 1:
        keep = (keep[:, None] * unit_size + torch.arange(unit_size)).flatten()
    return keep.to(device)


def cuts_of(entry: PlanEntry) -> Iterator[tuple[str, int, Tensor]]:
    """``(parameter, dimension, kept entries)`` for everything that the units of an entry own."""
    group, keep = entry.group, torch.tensor(entry.keep)
    if len(entry.keep) == group.num_units:
        return
    for member in group.producers:
        index = spread(keep, member.unit_size)
        yield f"{member.name}.weight", 0, index
        yield f"{member.name}.bias", 0, index
    for member in group.consumers:
        yield f"{member.name}.weight", 1, spread(keep, member.unit_size)
    for between in group.between:
        yield between.name, between.dim, spread(keep, between.unit_size)


def check_parameters(
    named: dict[str, nn.Parameter], cuts: dict[str, list[tuple[int, Tensor]]]
) -> None:
    """Refuse a parameter that also stands somewhere the plan does not cut; drop absent biases."""
    for name in [n for n in cuts if n.endswith(".bias") and n not in named]:
        del cuts[name]
    holders: dict[nn.Parameter, list[str]] = {}
    for name, parameter in named.items():
        holders.setdefault(parameter, []).append(name)
    for name in cuts:
        for other in holders[named[name]]:
            same = other in cuts and [(d, i.tolist()) for d, i in cuts[other]] == [
                (d, i.tolist()) for d, i in cuts[name]
            ]
            if not same:
                raise SurgeryError(f"{name!r} is tied to {other!r}, which would not be cut alike")


def cut(parameter: nn.Parameter, steps: list[tuple[int, Tensor]]) -> nn.Parameter:
    """A smaller parameter with the same dtype, device, ``requires_grad`` and gradient."""

    def sliced(tensor: Tensor) -> Tensor:
        for dim, index in steps:
            tensor = tensor.index_select(dim, index.to(tensor.device))
        return tensor.contiguous()

    fresh = nn.Parameter(sliced(parameter.detach()), requires_grad=parameter.requires_grad)
    fresh.__dict__.update(parameter.__dict__)
    if parameter.grad is not None:
        fresh.grad = sliced(parameter.grad)
    return fresh


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside what ``torch.compile`` returned, which computes with it; or the model."""
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


def linear_of(model: nn.Module, member: Member) -> nn.Linear:
    """The linear module of a member, or a refusal that names it."""
    try:
        module = model.get_submodule(member.name)
    except AttributeError as error:
        raise SurgeryError(f"{member.name!r}: the model has no such module") from error
    if type(module) not in (nn.Linear, MaskedLinear):
        raise SurgeryError(
            f"{member.name!r}: only a plain nn.Linear can be cut, this is {type(module).__name__}"
            f"{_sharded_itself(module)}"
        )
    for name in ("weight", "bias"):
        if name not in module._parameters:
            raise SurgeryError(f"{member.name!r}: its {name} is parametrized or no parameter")
    return module  # type: ignore[return-value]


def refuse_sharded(model: nn.Module, doing: str) -> None:
    """Refuse a model with sharded parameters.

    Raises:
        SurgeryError: it has some; tells the way out.
    """
    name = first_sharded(model)
    if name is not None:
        raise SurgeryError(
            f"{doing} needs whole weights, and {name!r} is sharded over ranks. {WAY_OUT}"
        )


def _sharded_itself(module: nn.Module) -> str:
    made = any(c.__name__ == "FSDPModule" for c in type(module).__mro__)
    return ": give fully_shard the block around it, not the linear itself" if made else ""


def checked_cuts(
    model: nn.Module, plan: SlimPlan, *, whole: bool = False
) -> tuple[dict[str, nn.Parameter], dict[str, list[tuple[int, Tensor]]]]:
    """The parameters by name, and the cuts that a plan means for them.

    Args:
        model: what is to be cut or masked; sharded parameters are brought to their sharded state.
        plan: what stays.
        whole: whether no parameter may be sharded.

    Raises:
        SurgeryError: the plan does not fit the model, or can't be applied exactly.
    """
    if uncompiled(model) is not model:
        raise SurgeryError(
            "the model is what torch.compile returned: pass the module that was compiled "
            "(model._orig_mod), with a plan for it; the compiled one follows"
        )
    if unwrapped(model) is not model:
        raise SurgeryError(
            f"the model is a {type(model).__name__}, whose buckets are of the weights as they are: "
            f"pass the module inside (model.module), with a plan for it"
        )
    if whole:
        refuse_sharded(model, "a cut")
    resharded_(model)
    fused = [name for name, m in model.named_modules() if isinstance(m, FusedModule)]
    if fused:
        raise SurgeryError(
            f"{fused[0]!r} is fused, with packed weights of its own: call slimkern.unfuse_(model) "
            "first, and slimkern.fuse_ after the cut"
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
            have = linear_of(model, member).weight.shape[dim]
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
            value = vars(model.get_submodule(a.module)).get(a.name)
        except AttributeError:
            value = None
        if not isinstance(value, int) or isinstance(value, bool):
            raise SurgeryError(f"{a.module}.{a.name}: the model has no such integer attribute")
