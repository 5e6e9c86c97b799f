"""The theorem, by plain slicing that is independent of slimkern's own surgery."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from slimkern.discovery import Group


def zero_units(model: nn.Module, group: Group, dead: list[int]) -> None:
    """Zero the columns of ``dead`` units in the group's second linears."""
    for member in group.consumers:
        weight = model.get_submodule(member.name).weight.data
        weight.unflatten(1, (-1, member.unit_size))[:, dead] = 0


def delete_units(model: nn.Module, group: Group, dead: list[int]) -> None:
    """Slice ``dead`` units out of everything that the group names; independent of surgery."""
    keep = [u for u in range(group.num_units) if u not in dead]

    def cut(tensor, dim, unit_size):
        parts = tensor.unflatten(dim, (group.num_units, unit_size))
        index = torch.tensor(keep)
        return nn.Parameter(parts.index_select(dim, index).flatten(dim, dim + 1))

    for member in group.producers:
        linear = model.get_submodule(member.name)
        linear.weight = cut(linear.weight.data, 0, member.unit_size)
        if linear.bias is not None:
            linear.bias = cut(linear.bias.data, 0, member.unit_size)
        linear.out_features = linear.weight.shape[0]
    for member in group.consumers:
        linear = model.get_submodule(member.name)
        linear.weight = cut(linear.weight.data, 1, member.unit_size)
        linear.in_features = linear.weight.shape[1]
    for between in group.between:
        owner, _, leaf = between.name.rpartition(".")
        parameter = getattr(model.get_submodule(owner), leaf)
        setattr(
            model.get_submodule(owner), leaf, cut(parameter.data, between.dim, between.unit_size)
        )
    for a in group.attributes:
        setattr(model.get_submodule(a.module), a.name, a.per_unit * len(keep))


def first_output(out: Any) -> Tensor:
    """The tensor that a model returns first."""
    return out if isinstance(out, torch.Tensor) else out[0]


def assert_deletion_is_exact(
    model: nn.Module, groups: Iterable[Group], run: Callable[[nn.Module], Tensor]
) -> None:
    """Zeroing units and deleting them give the same output, in fp64.

    Both sum the same terms but for zeros, so that they differ by the rounding of reassociated sums:
    a small multiple of eps times the size of the output. The model must also depend on the units.
    """
    generator = torch.Generator().manual_seed(1)
    before = run(model)
    for group in groups:
        order = torch.randperm(group.num_units, generator=generator).tolist()
        dead = order[: max(1, group.num_units // 2)]
        zero_units(model, group, dead)
        masked = run(model)
        assert not torch.allclose(masked, before, rtol=1e-6), group.name
        delete_units(model, group, dead)
        slim = run(model)
        scale = masked.abs().max()
        assert (slim - masked).abs().max() <= 1e4 * torch.finfo(torch.float64).eps * scale
        before = slim
