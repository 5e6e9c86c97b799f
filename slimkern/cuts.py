"""What a plan means for parameters: which entries of which stay, and the smaller tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from slimkern.plan import PlanEntry


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
