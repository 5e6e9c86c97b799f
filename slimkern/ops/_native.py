"""The only import of the C++ module ``slimkern._C``, and how a tensor is described to it.

torch is imported first, so that the module shares the OpenMP runtime that torch brought along.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BUILD_COMMAND = "pip install -e . --no-build-isolation"

try:
    import slimkern._C as _C
except ImportError as error:
    raise ImportError(
        f"slimkern's C++ module slimkern._C is missing or broken ({error}); build it in the "
        f"repository's folder with: {BUILD_COMMAND}"
    ) from error

Mat = tuple[int, int, int, int, int, int, int]
Vec = tuple[int, int, int, int]

DTYPES: dict[torch.dtype, int] = {
    torch.float32: _C.FLOAT32,
    torch.bfloat16: _C.BFLOAT16,
    torch.float64: _C.FLOAT64,
}
NO_VECTOR: Vec = (0, 0, 0, 0)

isa: Callable[[], str] = _C.isa
set_isa: Callable[[str], None] = _C.set_isa
available_isas: Callable[[], list[str]] = _C.available_isas
features: Callable[[], dict[str, bool]] = _C.features
gemm: Callable[..., None] = _C.gemm
gemm_scratch: Callable[..., int] = _C.gemm_scratch
column_sum: Callable[..., None] = _C.column_sum

MATHS: dict[str, int] = _C.MATHS
ACTIVATIONS: dict[str, int] = _C.ACTIVATIONS
NORMS: dict[str, int] = _C.NORMS
PACKS: dict[str, int] = _C.PACKS
SLOTS: dict[str, int] = _C.SLOTS
NORM_SLOTS: dict[str, int] = _C.NORM_SLOTS
MASKS: dict[str, int] = _C.MASKS
REMOVED: float = _C.REMOVED
maths: Callable[[], list[str]] = _C.maths
pack_bytes: Callable[..., int] = _C.pack_bytes
pack_begin: Callable[..., None] = _C.pack_begin
pack_linear: Callable[..., None] = _C.pack_linear
pack_norm: Callable[..., None] = _C.pack_norm
packed_linear_scratch: Callable[..., int] = _C.packed_linear_scratch
packed_linear: Callable[..., None] = _C.packed_linear
ffn_scratch: Callable[..., int] = _C.ffn_scratch
ffn: Callable[..., None] = _C.ffn
layers_scratch: Callable[..., int] = _C.layers_scratch
layers: Callable[..., None] = _C.layers
embeddings_scratch: Callable[..., int] = _C.embeddings_scratch
embeddings: Callable[..., None] = _C.embeddings
plain_linear_scratch: Callable[..., int] = _C.plain_linear_scratch
plain_linear: Callable[..., None] = _C.plain_linear
plain_gradient_scratch: Callable[..., int] = _C.plain_gradient_scratch
plain_gradient: Callable[..., None] = _C.plain_gradient
activate: Callable[..., None] = _C.activate
activation_grad: Callable[..., None] = _C.activation_grad
norm_forward: Callable[..., None] = _C.norm_forward
norm_grad: Callable[..., None] = _C.norm_grad
row_sums_scratch: Callable[..., int] = _C.row_sums_scratch
drop: Callable[..., None] = _C.drop
zero_columns: Callable[..., bool] = _C.zero_columns

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):  # systems that can fork
    os.register_at_fork(after_in_child=_after_fork)


def threads() -> int:
    """Threads that a kernel may use: torch's number; one in a forked child.

    The threads of a pool do not survive a fork: a parallel region entered in the child would wait
    for them for ever.
    """
    return 1 if _forked else torch.get_num_threads()


def dtype_code(tensor: Tensor, argument: str) -> int:
    """The C++ module's number for a storage type.

    Raises:
        TypeError: the kernels do not know it.
    """
    code = DTYPES.get(tensor.dtype)
    if code is None:
        accepted = ", ".join(str(dtype) for dtype in DTYPES)
        raise TypeError(f"{argument} has dtype {tensor.dtype}; backend 'cpu' accepts: {accepted}")
    return code


def mat(tensor: Tensor, rows: Tensor | None = None, cols: Tensor | None = None) -> Mat:
    """A 2-D tensor, any strides, of which ``rows`` and ``cols`` are selected (None: all)."""
    row_count, col_count = tensor.shape
    row_stride, col_stride = tensor.stride()
    row_address = 0 if rows is None else rows.data_ptr()
    col_address = 0 if cols is None else cols.data_ptr()
    return (
        tensor.data_ptr(), row_stride, col_stride, row_address, row_count, col_address, col_count
    )  # fmt: skip


def vec(tensor: Tensor, index: Tensor | None = None) -> Vec:
    """A 1-D tensor, any stride, of which the entries ``index`` are selected (None: all)."""
    address = 0 if index is None else index.data_ptr()
    return (tensor.data_ptr(), tensor.stride(0), address, tensor.shape[0])


def neighbours(tensor: Tensor) -> Tensor:
    """A matrix whose columns are neighbours, as the row kernels take it: itself, or a copy."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """A matrix whose columns are neighbours: its address and row stride."""
    return tensor.data_ptr(), tensor.stride(0)


def transposed(view: Mat) -> Mat:
    """The same elements with rows and columns exchanged."""
    address, row_stride, col_stride, row_index, row_count, col_index, col_count = view
    return (address, col_stride, row_stride, col_index, col_count, row_index, row_count)


def _choose_isa(environ: Any) -> None:
    """``SLIMKERN_ISA`` names the instruction set, for tests; read once, here."""
    name = environ.get("SLIMKERN_ISA")
    if name is None:
        return
    if name not in available_isas():
        raise ValueError(
            f"SLIMKERN_ISA is {name!r}; this machine accepts: {', '.join(available_isas())}"
        )
    set_isa(name)


_choose_isa(os.environ)
