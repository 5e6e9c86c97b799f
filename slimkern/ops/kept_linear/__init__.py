"""The parts of masked linears whose kept weights are copied out once a step: that of GPUs."""

from __future__ import annotations

from slimkern.ops.kept_linear.api import (
    joined_heads,
    kept_linear_dw,
    kept_linear_dx,
    kept_linear_fwd,
    kept_sums,
    kept_weights,
)

__all__ = [
    "joined_heads",
    "kept_linear_dw",
    "kept_linear_dx",
    "kept_linear_fwd",
    "kept_sums",
    "kept_weights",
]
