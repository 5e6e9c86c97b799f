"""Parameters that FSDP2 (``fully_shard``) has dealt out over ranks: DTensors of which a rank holds
a slice.

Scores need no whole weight: every rank adds up the elements that it holds, and the sums of all
slices make the score. A layer's columns are zeroed in every slice by its own rank. What needs whole
weights (surgery, saving) is refused, with the way out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from slimkern.parallel import message_device

WAY_OUT = (
    "Gather the full state dict (torch.distributed.checkpoint.state_dict.get_model_state_dict with "
    "StateDictOptions(full_state_dict=True, cpu_offload=True)), load it into a model that is not "
    "sharded on one rank, and slim that: slimkern.slim_(model, pruning.plan())"
)


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor; never imports DTensor to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def first_sharded(model: nn.Module) -> str | None:
    """The name of a parameter that is sharded, if any is."""
    return next((n for n, p in model.named_parameters() if is_sharded(p)), None)


def resharded_(model: nn.Module) -> None:
    """Let ``fully_shard`` modules hold their slices: after a forward they may hold whole copies,
    which are thrown away with whatever is written to them."""
    module = sys.modules.get("torch.distributed.fsdp")
    kind: Any = getattr(module, "FSDPModule", None)
    for part in model.modules() if kind is not None else ():
        if isinstance(part, kind):
            part.reshard()


def local(tensor: Tensor) -> Tensor:
    """The slice of a tensor that this rank holds, the same memory; a plain tensor is its own."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def place(tensor: Tensor) -> tuple[int, ...]:
    """Where in the whole tensor this rank's slice begins, per dimension."""
    if not is_sharded(tensor):
        return (0,) * tensor.dim()
    offsets = [0] * tensor.dim()
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    for dim, placement in enumerate(tensor.placements):  # type: ignore[attr-defined]
        if placement.is_shard():
            # As torch.chunk deals out: equal slices, the last ones shorter or empty.
            size = tensor.shape[placement.dim]
            share = -(-size // mesh.size(dim))
            offsets[placement.dim] = min(size, share * mesh.get_local_rank(dim))
    return tuple(offsets)


def own_part(vector: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """The entries of ``vector``, one per index of ``dim``, that this rank's slice has."""
    return vector.narrow(0, place(tensor)[dim], local(tensor).shape[dim])


def check_shards(tensors: Mapping[str, Tensor]) -> None:
    """Refuse DTensors that are anything but slices along one dimension (and copies of them).

    Raises:
        ValueError: tensor-parallel, strided or partial placements; names the parameter.
    """
    for name, tensor in tensors.items():
        if not is_sharded(tensor):
            continue
        placements: Any = tensor.placements  # type: ignore[attr-defined]
        kinds = [type(p).__name__ for p in placements]
        if kinds.count("Shard") > 1 or not {*kinds} <= {"Shard", "Replicate"}:
            raise ValueError(
                f"{name!r} is placed as {placements}: scores are taken of weights that fully_shard "
                f"has sliced along one dimension; tensor parallelism is not supported"
            )


def unit_share(elements: Tensor, weight: Tensor, dim: int, unit_size: int, mean: bool) -> Tensor:
    """What this rank's slice adds to the sums (or means) of its units' elements.

    Args:
        elements: fp32, of the slice's shape.
        weight: the sharded weight ``[out, in]``.
        dim: along which the units lie, ``unit_size`` indices each.
        mean: over all elements of a unit, those of other ranks included.

    Returns:
        ``[units]``; the sum of all ranks' is the score.
    """
    units = weight.shape[dim] // unit_size
    lines = elements.sum(1 - dim)
    start = place(weight)[dim]
    index = torch.arange(start, start + len(lines), device=lines.device) // unit_size
    sums = lines.new_zeros(units).index_add_(0, index, lines)
    return sums * (units / weight.numel()) if mean else sums


@torch.no_grad()
def add_shares_(shares: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Add up what the ranks hold of sharded weights, in one message per mesh; on all of them.

    Args:
        shares: member name -> fp32 tensor, overwritten with the sum where its weight is sharded.
        weights: member name -> its weight.
    """
    meshes: dict[Any, list[Tensor]] = {}
    for name, share in shares.items():
        weight = weights[name]
        if is_sharded(weight):
            placements: Any = weight.placements  # type: ignore[attr-defined]
            dims = tuple(i for i, p in enumerate(placements) if p.is_shard())
            meshes.setdefault((weight.device_mesh, dims), []).append(share)  # type: ignore[attr-defined]
    for (mesh, dims), parts in meshes.items():
        flat = torch.cat([p.flatten() for p in parts])
        for dim in dims:
            group = mesh.get_group(dim)
            flat = flat.to(message_device(group, flat.device))  # slices may rest on the CPU
            dist.all_reduce(flat, group=group)
        for part, total in zip(parts, flat.split([p.numel() for p in parts])):
            part.copy_(total.view(part.shape))


@contextmanager
def whole_shapes(model: nn.Module) -> Iterator[nn.Module]:
    """For the time of a ``with``: a sharded model as discovery reads it, without a message.

    Its parameters have whole shapes and no values (fake tensors), and the hooks that gather them
    are off. A model that is not sharded is left alone.
    """
    if first_sharded(model) is None:
        yield model
        return
    resharded_(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[int, nn.Parameter] = {}
    owners: list[dict[str, Any]] = [m._parameters for m in model.modules()]
    hooks: list[dict[int, Any]] = [
        d for m in model.modules() for d in (m._forward_pre_hooks, m._forward_hooks)
    ]
    registries: list[dict[Any, Any]] = [*owners, *hooks]
    before = [(d, dict(d)) for d in registries]
    try:
        for owner in owners:
            for name, parameter in owner.items():
                if parameter is not None and id(parameter) not in fakes:
                    fakes[id(parameter)] = _fake(parameter, mode)
                if parameter is not None:
                    owner[name] = fakes[id(parameter)]
        for registry in hooks:
            for key in [k for k, hook in registry.items() if _gathers(hook)]:
                del registry[key]
        yield model
    finally:
        for registry, entries in before:
            registry.clear()
            registry.update(entries)


def _fake(parameter: nn.Parameter, mode: FakeTensorMode) -> nn.Parameter:
    with mode:
        data = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        return nn.Parameter(data, requires_grad=parameter.requires_grad)


def _gathers(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")
