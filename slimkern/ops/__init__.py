"""The operations: one op is one folder, with an equation, its kernels and its validation.

Importing this package loads the C++ module and raises where it is missing or broken. An op's
function hides its folder of the same name: ``slimkern.ops.indexed_linear`` is the function.
"""

from __future__ import annotations

from slimkern.ops import _native  # noqa: F401  (fails here, with the build command)
from slimkern.ops.indexed_linear import check_index, indexed_linear

__all__ = ["check_index", "indexed_linear"]
