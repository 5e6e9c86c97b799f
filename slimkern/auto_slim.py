"""The three-call path: ``parse_auto_slim_config``, ``prepare_pruning``, ``model_slim``.

Names and arguments are those of Intel Neural Compressor's pruner. Everything here is written on
top of the explicit path (discover, plan, mask, slim) and adds nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from slimkern.config import KEYS, PATTERNS, PruningRule, WeightPruningConfig
from slimkern.config_checks import check_known, fraction
from slimkern.cuts import refuse_sharded
from slimkern.discovery import discover
from slimkern.discovery.groups import Discovery, Group
from slimkern.discovery.inputs import without_extras
from slimkern.masks import carried_masks, masked_beside, masked_plan
from slimkern.obs_step import first_batches
from slimkern.parallel import ranks_of, retire_, unwrapped, wrapper_of
from slimkern.plan import SlimPlan, plan_from_zeros
from slimkern.pruning import Pruning
from slimkern.shards import whole_shapes
from slimkern.surgery import slim_, unmasked
from slimkern.targets import check_device, described, entry_for, reasons, refused_zeros, targets

logger = logging.getLogger(__name__)


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
    found = _discover(model, dataloader)
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
            the module inside is pruned; it may be sharded by ``fully_shard``.
        config: what :func:`parse_auto_slim_config` returned, one such dictionary, or a
            :class:`WeightPruningConfig`.
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
        NotImplementedError: a pattern that is no whole channel or head.
        ValueError: an argument is not accepted, a schedule, the optimizer or the dataloader is
            missing, a rule finds no target, or two rules want the same one.
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
        chosen, notes, batches = _prepared(model, config, dataloader)
    return Pruning(model, chosen, optimizer, notes, batches, process_group)


def _prepared(
    model: nn.Module, config: Any, dataloader: Iterable[Any] | None
) -> tuple[list[tuple[PruningRule, tuple[Group, ...]]], list[str], list[Any]]:
    """Each rule with the groups that it prunes, notes, and the batches to calibrate on."""
    if not isinstance(config, WeightPruningConfig):
        config = WeightPruningConfig(config)
    if not config.rules:
        raise ValueError("config holds no rule: there is nothing to prune (were all sparsities 0?)")
    for rule in config.rules:
        if rule.pattern not in PATTERNS:
            raise NotImplementedError(
                f"pattern={rule.pattern!r} is not supported yet; supported are 'channelx1' (whole "
                f"FFN channels) and 'mha' (whole heads)"
            )
    batches: list[Any] = []
    if any(rule.needs_batches for rule in config.rules):
        if dataloader is None:
            raise ValueError(
                "pruning_type='obs' measures layers on calibration batches: give dataloader= "
                "(SlimCallback: calibration=)"
            )
        dataloader = batches = first_batches(model, dataloader)
    found = _discover(model, dataloader)
    return *_chosen(model, found, config.rules), batches


def _chosen(
    model: nn.Module, found: Discovery, rules: Iterable[PruningRule]
) -> tuple[list[tuple[PruningRule, tuple[Group, ...]]], list[str]]:
    """Each rule with the groups that it prunes, and notes; no group goes to two rules."""
    chosen: list[tuple[PruningRule, tuple[Group, ...]]] = []
    notes: list[str] = []
    owner: dict[str, int] = {}
    for position, rule in enumerate(rules):
        groups, more = targets(model, found, rule)
        for group in groups:
            if group.name in owner:
                raise ValueError(
                    f"rules {owner[group.name]} and {position} both prune {group.name!r}: narrow "
                    f"op_names or excluded_op_names"
                )
            owner[group.name] = position
        chosen.append((rule, groups))
        notes += more
    return chosen, notes


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
    found = _discover(model, dataloader)
    if not found.groups:
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
    if stuck and not entries:
        raise ValueError("the zeros of this model can't be removed exactly\n" + "\n".join(stuck))
    for note in (*zeros.notes, *stuck):
        logger.warning("model_slim: %s", note.strip())
    if not entries:
        logger.warning(
            "model_slim: none of the %d groups has a masked or zero unit; the model is unchanged",
            len(found.groups),
        )
        return given
    before = sum(p.numel() for p in model.parameters())
    slim_(model, SlimPlan(tuple(entries), zeros.notes), optimizer)
    after = sum(p.numel() for p in model.parameters())
    logger.info("model_slim: %d groups cut, %d -> %d parameters", len(entries), before, after)
    if wrapper is not None:
        retire_(wrapper)
        return model
    return given


def _discover(model: nn.Module, dataloader: Iterable[Any] | None) -> Discovery:
    """The groups of a model, dense or masked, at their full sizes."""
    with unmasked(model, [e.group for e in carried_masks(model)]):
        inputs = _example_inputs(model, dataloader)
        with whole_shapes(model):
            return discover(model, inputs)


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
