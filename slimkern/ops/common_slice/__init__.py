"""The slice that all slices of a tensor along a dimension are equal to."""

from __future__ import annotations

from slimkern.ops.common_slice.api import common_slice

__all__ = ["common_slice"]
