"""The third call: :func:`model_slim` removes for good what masks, or zeros, say."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import torch
from torch import nn

from slimkern.cuts import refuse_sharded
from slimkern.discovery import discover
from slimkern.discovery.groups import Discovery
from slimkern.discovery.inputs import without_extras
from slimkern.masks import carried_masks, masked_beside, masked_plan
from slimkern.ops import BlockMask
from slimkern.parallel import retire_, unwrapped, wrapper_of
from slimkern.patterns.masks import released
from slimkern.plan import SlimPlan, plan_from_zeros
from slimkern.shards import whole_shapes
from slimkern.surgery import slim_, unmasked
from slimkern.targets import described, reasons, refused_zeros

logger = logging.getLogger(__name__)


def model_slim(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    round_multiplier: int = 32,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """Remove for good what is masked, or zero, in a model.

    A masked group loses exactly its masked units: they were rounded when they were selected. In
    every other group the units whose columns in the second linear (or output projection) are all
    zero go, dead channels of lowest index staying to reach a multiple of ``round_multiplier``.
    The result equals the model as it was, to rounding, and is the same every time.

    A model in which groups were found but nothing is masked or zero comes back unchanged, so that
    a second call does no harm; a line in the log says so, as it does of zeros that rounding or a
    refusal keeps. What was removed is in ``model.slim_plan``.

    Nothing is removed for block masks (``4x1``, ``2:4`` ...): their linears become plain ones with
    zeros in them, a note in the plan says so, and a channel whose column they emptied goes like any
    other that is zero.

    Args:
        model: the model, changed in place. Of one in ``DistributedDataParallel``, the module inside
            is slimmed and returned, and the wrapper raises from then on: wrap the module anew.
        dataloader: its first batch serves as example inputs, where made-up ones do not do.
        round_multiplier: for zeros that slimkern did not select.
        optimizer: its parameters and their state are exchanged for the smaller ones, so that
            training goes on with it.

    Returns:
        the model.

    Raises:
        ValueError: nothing was found that could ever be removed, the only zeros are where a
            removal would not be exact, masks are there whose layers are not found, parameters are
            sharded, or the optimizer is not the model's; nothing has been changed then.
    """
    given, wrapper, model = model, wrapper_of(model), unwrapped(model)
    refuse_sharded(model, "model_slim")
    with released(model, for_good=True) as blocks:
        smaller = _slim(model, dataloader, round_multiplier, optimizer, blocks)
    if wrapper is None or not (smaller or blocks):
        return given
    if smaller:  # block masks leave the weights where they are, and a wrapper that holds them
        retire_(wrapper)
    return model


def _slim(
    model: nn.Module,
    dataloader: Iterable[Any] | None,
    round_multiplier: int,
    optimizer: torch.optim.Optimizer | None,
    blocks: Mapping[str, BlockMask],
) -> bool:
    """:func:`model_slim` of a model whose linears with ``blocks`` are plain already: whether
    anything was removed."""
    found = discovered(model, dataloader)
    if not found.groups and not blocks:
        raise ValueError(f"nothing can be removed from this {described(model)}\n{reasons(found)}")
    masks = _masks(model, found)
    masked = {e.group.name for e in masks}
    zeros = plan_from_zeros(
        model, [g for g in found.groups if g.name not in masked], round_multiplier
    )
    by_name = {e.group.name: e for e in (*masks, *zeros) if e.sparsity}
    order = {g.name: i for i, g in enumerate(found.groups)}
    entries = sorted(by_name.values(), key=lambda e: order.get(e.group.name, len(order)))
    stuck = refused_zeros(model, found)
    if stuck and not entries and not blocks:
        raise ValueError("the zeros of this model can't be removed exactly\n" + "\n".join(stuck))
    for note in (*zeros.notes, *stuck):
        logger.warning("model_slim: %s", note.strip())
    if not entries and not blocks:
        logger.warning(
            "model_slim: none of the %d groups has a masked or zero unit; the model is unchanged",
            len(found.groups),
        )
        return False
    notes = (*zeros.notes, *_block_notes(blocks))
    before = sum(p.numel() for p in model.parameters())
    slim_(model, SlimPlan(tuple(entries), notes), optimizer)
    after = sum(p.numel() for p in model.parameters())
    logger.info("model_slim: %d groups cut, %d -> %d parameters", len(entries), before, after)
    return bool(entries)


def _block_notes(blocks: Mapping[str, BlockMask]) -> list[str]:
    """What became of block masks, for the plan and the log."""
    if not blocks:
        return []
    total = sum(prod(m.shape) for m in blocks.values())
    zeros = sum(prod(m.shape) * (1 - m.density) for m in blocks.values())
    note = (
        f"{len(blocks)} linears with block masks are plain ones now: {zeros / total:.2%} of their "
        f"weights are zeros, which stay in them"
    )
    logger.info("model_slim: %s", note)
    return [note]


def _masks(model: nn.Module, found: Discovery) -> SlimPlan:
    """All masks of a model; a mask that can't be told of which group it is raises."""
    noted = carried_masks(model)
    names = {e.group.name for e in noted}
    read = masked_plan(model, [g for g in found.groups if g.name not in names])
    plan = SlimPlan((*noted.entries, *read.entries))
    loose = masked_beside(model, plan)
    if loose:
        raise ValueError(
            f"{loose[0]!r} ({len(loose)} in all) is masked with layers that are not found in this "
            f"{described(model)}: slim the model that was pruned\n{reasons(found)}"
        )
    return plan


def discovered(model: nn.Module, dataloader: Iterable[Any] | None) -> Discovery:
    """The groups of a model, dense or masked, at their full sizes."""
    with released(model), unmasked(model, [e.group for e in carried_masks(model)]):
        inputs = _example_inputs(model, dataloader)
        with whole_shapes(model):
            return discover(model, inputs)


def _example_inputs(model: nn.Module, dataloader: Iterable[Any] | None) -> Any:
    """The first batch, without keys that ``model.forward`` does not name."""
    if dataloader is None:
        return None
    if isinstance(dataloader, (int, float)):
        raise TypeError(
            f"dataloader must be an iterable of batches, got {dataloader!r}; sparsities are "
            f"keywords: ffn2_sparsity=, mha_sparsity="
        )
    batch = next(iter(dataloader), None)
    if batch is None:
        raise ValueError("dataloader holds no batch")
    return without_extras(model, batch)
