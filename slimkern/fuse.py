"""``fuse_`` and ``unfuse_``: a model's blocks replaced by fused ones, and back.

With ``surgery.py`` the only code that sets attributes on a user's model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slimkern.discovery import discover
from slimkern.discovery.blocks import UnfitError, embeds_text, passes_masks_on, proposals
from slimkern.discovery.groups import Group, Refusal
from slimkern.masks import is_masked
from slimkern.nn import fused_embeddings, fused_text  # noqa: F401  (they register their classes)
from slimkern.nn.fused import FusedModule, install, release
from slimkern.nn.packs import Packs
from slimkern.ops import choose_math, current_precision

_REFUSED = "fuse_refused"  # what fuse_ notes on the model


class FuseError(ValueError):
    """A model can't be fused; says what stands in the way."""


@dataclass(frozen=True)
class FusedBlock:
    """A module that was replaced.

    Attributes:
        name: its dotted name in the model.
        kind: ``encoder_layer``, ``attention_block`` or ``ffn``.
        math: how its products are computed: ``fp32``, ``bf16``, ``bf16x3`` or ``bf16x6``, on a GPU
            also ``tf32`` and ``fp16``.
        nbytes: memory of its packed weights.
    """

    name: str
    kind: str
    math: str
    nbytes: int


@dataclass(frozen=True)
class FusedBlocks:
    """What is fused in a model, and what was left as it is, with the reason. Prints as a table."""

    blocks: tuple[FusedBlock, ...]
    refused: tuple[Refusal, ...] = ()

    def __iter__(self) -> Iterator[FusedBlock]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __str__(self) -> str:
        rows = [("block", "kind", "math", "bytes")]
        rows += [(b.name or "(the model)", b.kind, b.math, str(b.nbytes)) for b in self.blocks]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in rows]
        return "\n".join([*lines, *_lines(self.refused)])


def fuse_(
    model: nn.Module, *, precision: str | None = None, example_inputs: Any = None
) -> nn.Module:
    """Put a model in the fused state: whole blocks in one call each, from packed weights.

    On a CPU each is one call of C++ kernels; on a GPU (CUDA, ROCm) a few Triton kernels around
    PyTorch's attention, which a CUDA graph of the whole model can capture.

    Encoder layers of BERT, RoBERTa, XLM-R, ELECTRA, DistilBERT and MPNet are replaced whole, dense
    or slim; elsewhere FFNs (two linears with an activation between, gated or not) and attention of
    these families. What is replaced keeps its object, its parameters and their names, its hooks and
    its ``isinstance``; `slimkern.fused_blocks` lists it, and what was left with the reason.

    Each replacement is compared with what it replaces before any is installed. It computes for
    inference only: training mode, a gradient, attention maps, a cache and cross-attention are
    errors that name :func:`unfuse_`. **Positions behind the last key that the attention mask keeps
    are zeros in its output** (plain modules leave numbers there that nobody attends to).

    Weights are packed here, once: memory beside the model of about its layers' size. When a
    parameter changes later (``load_state_dict``, ``.to(dtype or device)``, an optimizer's step),
    the next call outside of a compiled graph packs it again; writes through ``.data`` are not
    noticed.
    Copies and pickles pack on their first call.

    Args:
        model: dense or slim, changed in place. A fused model is fused anew.
        precision: of float32 products, ``highest``, ``high`` or ``medium``; None: PyTorch's own
            setting of now, `torch.set_float32_matmul_precision`. Models in bfloat16, and on a GPU
            in float16, compute in it.
        example_inputs: as for `slimkern.discover`, to name what else could be fused but is not;
            None: derived for Hugging Face models, and not looked for elsewhere.

    Returns:
        the model.

    Raises:
        FuseError: the model is masked or compiled, or nothing in it can be fused.
        ValueError: another precision. In either case nothing has been changed.
    """
    if model._modules.get("_orig_mod") is not None:
        raise FuseError("the model is compiled: fuse the module inside, then compile")
    if is_masked(model):
        raise FuseError("the model is masked: slim it first (slimkern.slim_, slimkern.model_slim)")
    if precision is None:
        precision = current_precision("cpu" if _on_cpu(model) else "cuda")
    choose_math(torch.float32, precision)  # raises where there is no such precision
    before = [(m, m.call, vars(m).get("packs")) for m in _fused(model)]
    refused_before = vars(model).get(_REFUSED)
    unfuse_(model)
    try:
        chosen, refused = _choose(model, precision)
        embedding = _choose_embeddings(model, refused)
        refused += _left_over(model, chosen, refused, example_inputs)
        if not chosen:
            raise FuseError(
                "nothing can be fused:\n"
                + "\n".join(_lines(refused) or ["no encoder layer or FFN is known in it"])
            )
    except BaseException:
        for module, call, packs in before:
            install(module, call, packs)
        if refused_before is not None:
            setattr(model, _REFUSED, refused_before)
        raise
    for block, made in chosen:
        install(block, made.block.call, made)
    for table, call in embedding:
        install(table, call, None)
    for stack in list(model.modules()):
        how = passes_masks_on(stack)
        if how is not None and any(isinstance(m, FusedModule) for m in stack.modules()):
            install(stack, how, None)
    setattr(model, _REFUSED, tuple(refused))
    return model


def unfuse_(model: nn.Module) -> nn.Module:
    """Take a model out of the fused state: the plain modules again, bit by bit; packs are freed.

    Args:
        model: changed in place; one that is not fused stays as it is.

    Returns:
        the model.
    """
    for module in _fused(model):
        release(module)
    vars(model).pop(_REFUSED, None)
    return model


def fused_blocks(model: nn.Module) -> FusedBlocks:
    """What of a model is fused, in the order of its modules, and what ``fuse_`` left as it is."""
    blocks = []
    for name, module in model.named_modules():
        packs: Packs | None = vars(module).get("packs") if isinstance(module, FusedModule) else None
        if packs is not None:
            packed = packs.fresh(module)
            blocks.append(FusedBlock(name, packed.kind, packed.math, packed.nbytes))
    return FusedBlocks(tuple(blocks), vars(model).get(_REFUSED, ()))


def _on_cpu(model: nn.Module) -> bool:
    return next((p.is_cpu for p in model.parameters()), True)


def _fused(model: nn.Module) -> list[FusedModule]:
    return [m for m in model.modules() if isinstance(m, FusedModule)]


def _lines(refused: Any) -> list[str]:
    return [f"refused  {r.name or '(the model)'}: {r.reason}" for r in refused]


def _choose(
    model: nn.Module, precision: str
) -> tuple[list[tuple[nn.Module, Packs]], list[Refusal]]:
    """The modules to replace, from the outside in, and what is of a known kind but unfit."""
    from slimkern.fuse_check import (
        MismatchError,
        fitting,
    )  # not before: it imports triton, by torch

    chosen: list[tuple[nn.Module, Packs]] = []
    refused: list[Refusal] = []
    seen: set[int] = set()

    def visit(name: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        try:
            proposed = proposals(name, module)
            if proposed:
                chosen.append((module, fitting(module, proposed, precision)))
                return
        except (UnfitError, MismatchError) as error:
            refused.append(Refusal(name, str(error)))
        for key, child in module.named_children():
            visit(f"{name}.{key}" if name else key, child)

    visit("", model)
    return chosen, refused


def _choose_embeddings(model: nn.Module, refused: list[Refusal]) -> list[tuple[nn.Module, str]]:
    """Modules that embed text, and how they are called; what is of a known kind but unfit goes to
    ``refused``."""
    from slimkern.fuse_check import MismatchError, check_embeddings

    chosen = []
    for name, module in model.named_modules():
        try:
            call = embeds_text(module)
            if call is not None:
                check_embeddings(module, call)
                chosen.append((module, call))
        except (UnfitError, MismatchError) as error:
            refused.append(Refusal(name, str(error)))
    return chosen


def _left_over(
    model: nn.Module,
    chosen: list[tuple[nn.Module, Packs]],
    refused: list[Refusal],
    example_inputs: Any,
) -> list[Refusal]:
    """What discovery knows besides: FFNs and attention in modules that no description fits."""
    if example_inputs is None and getattr(model, "main_input_name", None) is None:
        return []
    inside = {id(m) for block, _ in chosen for m in block.modules()}
    rest = [m for m in model.modules() if id(m) not in inside and not isinstance(m, nn.Embedding)]
    weights = [w for m in rest if (w := m._parameters.get("weight")) is not None]
    if sum(w.dim() == 2 for w in weights) < 2:
        return []  # not even a first and a second linear
    known = [packs.block.name for _, packs in chosen] + [r.name for r in refused]
    try:
        groups = discover(model, example_inputs).groups
    except Exception as error:
        if example_inputs is not None:
            raise
        return [Refusal("", f"what else it has was not looked for: {error}")]
    return [
        Refusal(g.name, _why(model, g)) for g in groups if not g.is_head and not _within(g, known)
    ]


def _within(group: Group, names: list[str]) -> bool:
    place = f"{group.name}."
    return any(not name or place.startswith(f"{name}.") for name in names)


def _why(model: nn.Module, group: Group) -> str:
    owner = type(model.get_submodule(group.name.rpartition(".")[0])).__name__
    if group.kind == "mha":
        return f"it is not known how the attention of {owner} is called"
    return f"its linears are in {owner}, which is no FFN by itself"
