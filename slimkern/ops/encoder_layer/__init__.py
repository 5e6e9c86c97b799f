"""A whole encoder layer, attention and FFN, in one call."""

from __future__ import annotations

from slimkern.ops.encoder_layer.api import encoder_layer

__all__ = ["encoder_layer"]
