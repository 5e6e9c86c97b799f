"""slimkern makes transformers smaller, exactly, and then really faster."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Discovery": "discovery", "Group": "discovery", "discover": "discovery",
    "PlanEntry": "plan", "SlimPlan": "plan", "make_plan": "plan",
    "Pruning": "pruning", "SurgeryError": "surgery", "mask_": "surgery", "slim_": "surgery",
    "WeightPruningConfig": "config", "importance": "criteria",
    "load": "checkpoint", "save": "checkpoint",
    "model_slim": "auto_slim", "parse_auto_slim_config": "auto_slim", "prepare_pruning": "auto_slim",
}
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"slimkern.{_HOME[name]}"), name)
    raise AttributeError(name)
