"""The op ``indexed_linear``: a linear layer of which only some rows and columns are computed."""

from __future__ import annotations

from slimkern.ops.indexed_linear.api import check_index, indexed_linear

__all__ = ["check_index", "indexed_linear"]
