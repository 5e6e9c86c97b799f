"""Rows of word, token type and position tables, added and normalised, in one pass."""

from __future__ import annotations

from slimkern.ops.embeddings.api import embeddings

__all__ = ["embeddings"]
