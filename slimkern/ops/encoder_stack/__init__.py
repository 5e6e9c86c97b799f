"""Encoder layers one after the other, in one call."""

from __future__ import annotations

from slimkern.ops.encoder_stack.api import encoder_stack

__all__ = ["encoder_stack"]
