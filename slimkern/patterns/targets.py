"""Which linear layers a rule with a block pattern prunes, and why it can't prune others."""

from __future__ import annotations

import sys

import torch
from torch import nn

from slimkern.config import PruningRule
from slimkern.nn import BlockMasked, BlockMaskedLinear, FusedModule, MaskedLinear
from slimkern.patterns.pattern import BlockPattern
from slimkern.patterns.scores import BlockTarget
from slimkern.shards import is_sharded
from slimkern.targets import described, hits

_SHOWN = 12  # refusals in an error message


def masked_class(module: nn.Module) -> type[BlockMasked] | None:
    """The masked class that takes a module's place, or ``None`` where there is none for it."""
    if isinstance(module, BlockMasked):
        return type(module)
    if type(module) is nn.Linear:
        return BlockMaskedLinear
    transformers = sys.modules.get("transformers.pytorch_utils")
    if transformers is not None and type(module) is transformers.Conv1D:
        from slimkern.nn.block_masked_conv1d import BlockMaskedConv1D

        return BlockMaskedConv1D
    return None


def block_targets(model: nn.Module, rule: PruningRule) -> tuple[tuple[BlockTarget, ...], list[str]]:
    """The layers that a rule means, in the order of the model's modules, and notes.

    Without ``op_names`` every layer of the types asked for is meant but the model's head: the last
    linear, if no module with parameters comes after it. Convolutions, which the default types
    include, are left alone with a note then, and refused where ``op_names`` selects them.

    Raises:
        ValueError: a layer that is meant can't be pruned by this pattern, each named with its
            reason; no layer is meant; or the model is fused.
    """
    pattern = rule.block
    assert pattern is not None
    modules = dict(model.named_modules())
    fused = [n for n, m in modules.items() if isinstance(m, FusedModule)]
    if fused:
        raise ValueError(
            f"{fused[0]!r} is fused, with packed weights of its own: call slimkern.unfuse_(model) "
            f"before it is pruned"
        )
    head = None if rule.op_names else _head(modules)
    names, holders = set(modules), _holders(modules)
    found: list[BlockTarget] = []
    refused: list[str] = []
    notes = _idle_exclusions(rule, names)
    for name, module in modules.items():
        if not _meant(rule, name, module, names):
            continue
        reason = _unfit(module, name, pattern, holders)
        if name == head:
            notes.append(f"{name}: taken for the model's head and left out; op_names takes it in")
        elif reason is None:
            found.append(_target(module, name, pattern))
        elif not rule.op_names and masked_class(module) is None and _is_convolution(module):
            notes.append(f"{name}: left out: {reason}")
        else:
            refused.append(f"  {name}: {reason}")
    if refused:
        more = [f"  ... and {len(refused) - _SHOWN} more"] if len(refused) > _SHOWN else []
        raise ValueError(
            f"pattern {rule.pattern!r} can't prune these layers; leave them out with "
            f"excluded_op_names\n" + "\n".join(refused[:_SHOWN] + more)
        )
    if not found:
        raise ValueError(_nothing(model, rule, notes))
    return tuple(found), notes


def _nothing(model: nn.Module, rule: PruningRule, notes: list[str]) -> str:
    asked = f" that op_names={list(rule.op_names)} selects" if rule.op_names else ""
    excluded = rule.excluded_op_names
    less = f", excluded_op_names={list(excluded)} left out" if excluded else ""
    types = f" (pruning_op_types={list(rule.pruning_op_types)})"
    return "\n".join(
        [
            f"pattern {rule.pattern!r}: no linear layer{asked}{less} in this "
            f"{described(model)}{types}",
            *(f"  {note}" for note in notes),
        ]
    )


def _idle_exclusions(rule: PruningRule, modules: set[str]) -> list[str]:
    return [
        f"excluded_op_names: {entry!r} is the name of no module"
        for entry in rule.excluded_op_names
        if not any(hits((entry,), (name,), modules) for name in modules)
    ]


def _meant(rule: PruningRule, name: str, module: nn.Module, modules: set[str]) -> bool:
    if not name or not isinstance(getattr(module, "weight", None), torch.Tensor):
        return False  # the model itself has no name to be selected by
    if not any(p in c.__name__ for c in type(module).__mro__ for p in rule.pruning_op_types):
        return False
    if rule.op_names and not hits(rule.op_names, (name,), modules):
        return False
    return not hits(rule.excluded_op_names, (name,), modules)


def _head(modules: dict[str, nn.Module]) -> str | None:
    """The last module with parameters of its own, where it is a linear."""
    owners = [n for n, m in modules.items() if any(True for _ in m.parameters(recurse=False))]
    if owners and masked_class(modules[owners[-1]]) is not None:
        return owners[-1]
    return None


def _holders(modules: dict[str, nn.Module]) -> dict[int, list[str]]:
    """The names of the parameters that each parameter goes by."""
    held: dict[int, list[str]] = {}
    for name, module in modules.items():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                held.setdefault(id(parameter), []).append(f"{name}.{key}" if name else key)
    return held


def _is_convolution(module: nn.Module) -> bool:
    return any("Conv" in c.__name__ for c in type(module).__mro__)


def _unfit(
    module: nn.Module, name: str, pattern: BlockPattern, holders: dict[int, list[str]]
) -> str | None:
    """Why a module can't be pruned by a pattern, or ``None``."""
    if isinstance(module, MaskedLinear):
        return "it carries masks of whole units already; slim the model first (model_slim)"
    if masked_class(module) is None:
        return f"{type(module).__name__} is not supported: only nn.Linear and transformers' Conv1D"
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance"
    if "weight" not in module._parameters or "bias" not in module._parameters:
        return "its weight is computed from other parameters (parametrization)"
    tied = [n for n in holders[id(module._parameters["weight"])] if n != f"{name}.weight"]
    if tied:
        return f"its weight is tied to {tied[0]!r}, which would be masked with it"
    if is_sharded(module._parameters["weight"]):
        return "its weight is sharded over ranks, and a block mask needs it whole (use DDP)"
    target = _target(module, name, pattern)
    if min(target.shape) == 0:
        return f"its weight is empty, {list(target.shape)}"
    if pattern.of and target.shape[1] % pattern.of:
        return (
            f"its {target.shape[1]} inputs can't be divided into groups of {pattern.of}, which "
            f"{pattern.text} needs"
        )
    if isinstance(module, BlockMasked) and module.block != target.block:
        rows, cols = module.block
        return f"it carries masks of {rows}x{cols} blocks already; slim the model first"
    return None


def _target(module: nn.Module, name: str, pattern: BlockPattern) -> BlockTarget:
    kind = masked_class(module)
    assert kind is not None
    rows, cols = module._parameters["weight"].shape  # type: ignore[union-attr]
    shape = (cols, rows) if kind.transposed else (rows, cols)
    return BlockTarget(name, shape, pattern.block(shape), kind.transposed)
