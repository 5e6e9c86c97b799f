"""An activation and its gradient."""

from __future__ import annotations

from slimkern.ops.activation.api import activation_fwd, activation_grad

__all__ = ["activation_fwd", "activation_grad"]
