"""The three-call path: ``parse_auto_slim_config``, ``prepare_pruning``, ``model_slim``.

Names and arguments are those of Intel Neural Compressor's pruner. Everything here is written on
top of the explicit path (discover, plan, mask, slim) and adds nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from slimkern.config import KEYS, PruningRule, WeightPruningConfig
from slimkern.config_checks import check_known, fraction
from slimkern.discovery.groups import Discovery, Group
from slimkern.obs_step import first_batches
from slimkern.parallel import ranks_of, unwrapped, wrapper_of
from slimkern.patterns.masks import block_masked
from slimkern.patterns.scores import BlockTarget
from slimkern.patterns.targets import block_targets
from slimkern.pruning import Pruning
from slimkern.removal import discovered, model_slim
from slimkern.targets import check_device, entry_for, targets

__all__ = ["model_slim", "parse_auto_slim_config", "prepare_pruning"]

UnitRules = list[tuple[PruningRule, tuple[Group, ...]]]
BlockRules = list[tuple[PruningRule, tuple[BlockTarget, ...]]]


def parse_auto_slim_config(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    ffn2_sparsity: float = 0.0,
    mha_sparsity: float = 0.0,
    **kwargs: Any,
) -> list[dict[str, Any]]:
    """Find what can be pruned, and write the rules for :func:`prepare_pruning`.

    Args:
        model: the model, not changed.
        dataloader: its first batch serves as example inputs; needed only for models that can't be
            called on made-up token ids.
        ffn2_sparsity: fraction of FFN channels to remove, in [0, 1); 0 leaves FFNs out.
        mha_sparsity: fraction of attention heads to remove, in [0, 1); 0 leaves attention out.
        **kwargs: any other key of :class:`WeightPruningConfig`, written into both rules.
            ``op_names`` narrows the targets down; without it all are taken but the model's head
            (a second linear that reaches the outputs with no other linear after it).

    Returns:
        up to two dictionaries: ``{"op_names": [...], "pattern": "channelx1", "target_sparsity":
        ffn2_sparsity, **kwargs}`` with the names of second linears, and ``{"pattern": "mha",
        "op_names": [...], "target_sparsity": mha_sparsity, **kwargs}`` with the names of output
        projections.

    Raises:
        TypeError: an unknown keyword.
        ValueError: a value is not accepted, or nothing was found for a part that is asked for;
            the message tells what was refused, and why.
    """
    for key in ("pattern", "target_sparsity"):
        if key in kwargs:
            raise TypeError(
                f"{key}= is decided here: ask for FFN channels with ffn2_sparsity, for heads with "
                f"mha_sparsity"
            )
    check_known(kwargs, [k for k in KEYS if k not in ("pattern", "target_sparsity")])
    wanted = {"channelx1": ("ffn2_sparsity", ffn2_sparsity), "mha": ("mha_sparsity", mha_sparsity)}
    rules = {}
    for pattern, (argument, sparsity) in wanted.items():
        if fraction(argument, sparsity):
            values = {**kwargs, "pattern": pattern, "target_sparsity": sparsity}
            rules[pattern] = PruningRule.from_values(values)
    if not rules:
        return []
    model = unwrapped(model)
    found = discovered(model, dataloader)
    configs = []
    for pattern, rule in rules.items():
        groups, _ = targets(model, found, rule)
        names: dict[str, Any] = {"op_names": [entry_for(g.name) for g in groups]}
        names["pattern"] = pattern
        options = {k: v for k, v in kwargs.items() if k != "op_names"}
        configs.append({**names, "target_sparsity": rule.target_sparsity, **options})
    return configs


def prepare_pruning(
    model: nn.Module,
    config: Iterable[Mapping[str, Any]] | Mapping[str, Any] | WeightPruningConfig,
    optimizer: torch.optim.Optimizer | None = None,
    dataloader: Iterable[Any] | None = None,
    loss_func: Any = None,
    framework: str = "pytorch",
    device: torch.device | str | None = None,
    process_group: Any = None,
) -> Pruning:
    """Let masks grow while ``optimizer`` trains ``model``.

    Nothing is cut before the first prune step (unless a rule says step 0), and nothing has been
    changed when this raises.

    Args:
        model: the model; it may carry masks already, which stay (zeros that are no masks are
            trained like any weight). Of a compiled model, or one in ``DistributedDataParallel``,
            the module inside is pruned; it may be sharded by ``fully_shard``, but for rules with
            a block pattern.
        config: what :func:`parse_auto_slim_config` returned, one such dictionary, or a
            :class:`WeightPruningConfig`. Rules with a block pattern need no example inputs: they
            prune linears (and transformers' ``Conv1D``) by name.
        optimizer: the optimizer whose steps count. It may be left out only where every rule prunes
            by magnitude or ``obs`` at step 0.
        dataloader: its first batch serves as example inputs, where made-up ones do not do. For
            ``pruning_type="obs"`` it is needed: its first batches, up to 8,192 tokens, are read
            once and kept, and every prune step runs the model on them in evaluation mode. Labels
            are not used. In a run of several processes rank 0's batches count; one that is to be
            resumed exactly needs the same ones again (a loader that does not shuffle).
        loss_func: accepted for compatibility; no supported pruning type calls it.
        framework: ``pytorch``.
        device: ``None``, or the device that the model is on.
        process_group: the processes that train the model together, each of which makes this call;
            by default all of ``torch.distributed``. A process that trains a model of its own gives
            a group of itself.

    Returns:
        the :class:`~slimkern.pruning.Pruning`: ``sparsity()``, ``report()``, ``state_dict()``.

    Raises:
        ValueError: an argument is not accepted, a schedule, the optimizer or the dataloader is
            missing, a rule finds no target, two rules want the same one, or a layer that a rule
            names does not take its pattern.
        TypeError: an unknown key.
    """
    wrapper = wrapper_of(model)
    if process_group is None and wrapper is not None:
        process_group = wrapper.process_group
    with ranks_of(process_group).together("prepare_pruning"):
        if framework != "pytorch":
            raise ValueError(f"framework={framework!r} is not accepted; accepted: 'pytorch'")
        model = unwrapped(model)
        check_device(model, device)
        units, blocks, notes, batches = _prepared(model, config, dataloader)
    return Pruning(model, units, optimizer, notes, batches, process_group, blocks)


def _prepared(
    model: nn.Module, config: Any, dataloader: Iterable[Any] | None
) -> tuple[UnitRules, BlockRules, list[str], list[Any]]:
    """What each rule prunes, notes, and the batches to calibrate on."""
    if not isinstance(config, WeightPruningConfig):
        config = WeightPruningConfig(config)
    if not config.rules:
        raise ValueError("config holds no rule: there is nothing to prune (were all sparsities 0?)")
    batches: list[Any] = []
    if any(rule.needs_batches for rule in config.rules):
        if dataloader is None:
            raise ValueError(
                "pruning_type='obs' measures layers on calibration batches: give dataloader= "
                "(SlimCallback: calibration=)"
            )
        dataloader = batches = first_batches(model, dataloader)
    units = any(rule.block is None for rule in config.rules)
    found = discovered(model, dataloader) if units else Discovery(())
    return *_chosen(model, found, config.rules), batches


def _chosen(
    model: nn.Module, found: Discovery, rules: Iterable[PruningRule]
) -> tuple[UnitRules, BlockRules, list[str]]:
    """Each rule with the groups or the linears that it prunes, and notes; none goes to two rules,
    and neither does a linear of a group."""
    units: UnitRules = []
    blocks: BlockRules = []
    notes: list[str] = []
    owner: dict[str, int] = {}
    carried = block_masked(model)
    for position, rule in enumerate(rules):
        if rule.block is None:
            groups, more = targets(model, found, rule)
            wanted = [m.name for g in groups for m in (*g.consumers, *g.producers)]
            units.append((rule, groups))
            both = [name for name in wanted if name in carried]
            if both:
                raise ValueError(
                    f"pattern {rule.pattern!r}: {both[0]!r} carries block masks already, which "
                    f"can't be masked by units too; slim the model first (model_slim)"
                )
        else:
            linears, more = block_targets(model, rule)
            wanted = [t.name for t in linears]
            blocks.append((rule, linears))
        for name in dict.fromkeys(wanted):
            if owner.setdefault(name, position) != position:
                raise ValueError(
                    f"rules {owner[name]} and {position} both prune {name!r}: narrow op_names or "
                    f"excluded_op_names"
                )
        notes += more
    return units, blocks, notes
