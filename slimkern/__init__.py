"""slimkern makes transformers smaller, exactly, and then really faster.

The three-call path::

    configs = slimkern.parse_auto_slim_config(model, ffn2_sparsity=0.8, mha_sparsity=0.6, ...)
    pruning = slimkern.prepare_pruning(model, configs, optimizer)
    ...  # your own training loop
    model = slimkern.model_slim(model)

Without training::

    small, plan = slimkern.one_shot(model, batches, ffn2_sparsity=0.5, mha_sparsity=0.5)

The explicit path: ``discover``, ``importance``, ``make_plan``, ``mask_``, ``slim_``, ``fuse_``,
``save``, ``load``.
"""

from __future__ import annotations

from importlib.metadata import version as _version

from slimkern import cpu
from slimkern.auto_slim import model_slim, parse_auto_slim_config, prepare_pruning
from slimkern.checkpoint import CheckpointError, load, save
from slimkern.config import WeightPruningConfig
from slimkern.criteria import importance
from slimkern.cuts import SurgeryError
from slimkern.discovery import Discovery, Group, discover
from slimkern.fuse import FusedBlock, FusedBlocks, FuseError, fuse_, fused_blocks, unfuse_
from slimkern.mask_blocks import MaskedBlocks, masked_blocks
from slimkern.one_shot import OneShot, one_shot, one_shot_family
from slimkern.plan import PlanEntry, SlimPlan, make_plan
from slimkern.pruning import Pruning
from slimkern.surgery import mask_, slim_

__version__ = _version("slimkern")

__all__ = [
    "CheckpointError",
    "Discovery",
    "FuseError",
    "FusedBlock",
    "FusedBlocks",
    "Group",
    "MaskedBlocks",
    "OneShot",
    "PlanEntry",
    "Pruning",
    "SlimPlan",
    "SurgeryError",
    "WeightPruningConfig",
    "cpu",
    "discover",
    "fuse_",
    "fused_blocks",
    "importance",
    "load",
    "make_plan",
    "mask_",
    "masked_blocks",
    "model_slim",
    "one_shot",
    "one_shot_family",
    "parse_auto_slim_config",
    "prepare_pruning",
    "save",
    "slim_",
    "unfuse_",
]
