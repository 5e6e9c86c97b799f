"""Dropout whose choices follow from a seed, so that the backward makes them again."""

from __future__ import annotations

from slimkern.ops.seeded_dropout.api import draw_seed, dropout, seeded_dropout

__all__ = ["draw_seed", "dropout", "seeded_dropout"]
