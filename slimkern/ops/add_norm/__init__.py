"""LayerNorm of a sum, in training."""

from __future__ import annotations

from slimkern.ops.add_norm.api import add_norm_fwd, add_norm_grad

__all__ = ["add_norm_fwd", "add_norm_grad"]
