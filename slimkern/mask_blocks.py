"""Which blocks of a model ``mask_`` makes masked blocks, and which stay linear by linear."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from slimkern.discovery.block import Block
from slimkern.discovery.blocks import UnfitError, proposals
from slimkern.discovery.groups import Refusal
from slimkern.nn import MaskedBlock, MaskedLinear
from slimkern.plan import SlimPlan

REFUSED = "mask_refused"  # what mask_ notes on the model


@dataclass(frozen=True)
class MaskedBlockReport:
    """A masked block.

    Attributes:
        name: the module's dotted name in the model.
        kind: ``encoder_layer``, ``attention_block`` or ``ffn``.
        aside: why its plain forward would compute the next call, linear by linear; or None.
    """

    name: str
    kind: str
    aside: str | None = None


@dataclass(frozen=True)
class MaskedBlocks:
    """The masked blocks of a model, and what is masked linear by linear, with the reason.

    Prints as a table.
    """

    blocks: tuple[MaskedBlockReport, ...]
    refused: tuple[Refusal, ...] = ()

    def __iter__(self) -> Iterator[MaskedBlockReport]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __str__(self) -> str:
        rows = [("block", "kind", "")]
        rows += [
            (b.name or "(the model)", b.kind, f"linear by linear: {b.aside}" if b.aside else "")
            for b in self.blocks
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in rows]
        lines += [f"linear by linear  {r.name or '(the model)'}: {r.reason}" for r in self.refused]
        return "\n".join(lines)


def masked_blocks(model: nn.Module) -> MaskedBlocks:
    """What of a masked model is computed in whole blocks, and what is not, with the reason.

    Args:
        model: is only read.

    Returns:
        the blocks in the order of the model's modules, and what ``mask_`` refused.
    """
    found = [
        MaskedBlockReport(name, module.masked_block.kind, module.aside())
        for name, module in model.named_modules()
        if isinstance(module, MaskedBlock)
    ]
    return MaskedBlocks(tuple(found), vars(model).get(REFUSED, ()))


def with_told(model: nn.Module, refused: list[Refusal]) -> tuple[Refusal, ...]:
    """What was refused before and now, the last reason of each module."""
    told = {r.name: r for r in (*vars(model).get(REFUSED, ()), *refused)}
    return tuple(told.values())


def fitting_blocks(
    model: nn.Module, plan: SlimPlan
) -> tuple[list[tuple[nn.Module, Block]], list[Refusal]]:
    """The modules that a plan masks and that are blocks, from the outside in; and what is not.

    A description is taken only where it computes, in float64, what the module computes. Nothing is
    changed.
    """
    members = {
        m.name
        for e in plan.entries
        if len(e.keep) < e.group.num_units
        for m in (*e.group.producers, *e.group.consumers)
    }
    chosen: list[tuple[nn.Module, Block]] = []
    refused: list[Refusal] = []
    seen: set[int] = set()

    def visit(name: str, module: nn.Module) -> None:
        inside = f"{name}." if name else ""
        if not any(m.startswith(inside) for m in members) or id(module) in seen:
            return
        seen.add(id(module))
        if isinstance(module, MaskedBlock):
            return
        try:
            block = _block_of(name, module)
        except UnfitError as error:
            refused.append(Refusal(name, str(error)))
            block = None
        if block is not None:
            chosen.append((module, block))
            return
        for key, child in module.named_children():
            visit(f"{inside}{key}", child)

    if members:
        visit("", model)
    return chosen, refused


def _block_of(name: str, module: nn.Module) -> Block | None:
    """What a module is as a block; None where nothing is known of its kind.

    Raises:
        UnfitError: it is of a known kind, and can't be a masked block.
    """
    masked = [n for n, m in module.named_modules() if isinstance(m, MaskedLinear)]
    proposed = () if masked else proposals(name, module)
    proposed = tuple(b for b in proposed if b.ffn is None or b.ffn.up is None)
    if not proposed:
        return None
    from slimkern.fuse_check import (
        MismatchError,
        identified,
    )  # not before: it imports triton, by torch

    try:
        return identified(module, proposed)
    except MismatchError as error:
        raise UnfitError(str(error)) from error
