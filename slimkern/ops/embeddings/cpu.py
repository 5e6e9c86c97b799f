"""The equation on the C++ kernels; indices are checked there, before anything is written."""

from __future__ import annotations

from torch import Tensor

from slimkern.ops import _native

_Table = tuple[int, int, int, int, int, int, int]


def _table(weight: Tensor, ids: Tensor | None, B: int, step: int) -> _Table:
    """A table and the row of each token: of ``ids`` [B or 1, T], or t * step."""
    if ids is None:
        return (weight.data_ptr(), weight.shape[0], weight.stride(0), 0, 0, 0, step)
    over_batch = ids.stride(0) if ids.shape[0] == B else 0
    place = (ids.data_ptr(), over_batch, ids.stride(1))
    return (weight.data_ptr(), weight.shape[0], weight.stride(0), *place, 0)


def embeddings(
    ids: Tensor,
    words: Tensor,
    types: Tensor | None,
    type_ids: Tensor | None,
    positions: Tensor,
    position_ids: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
) -> Tensor:
    """ids [B, T] -> y [B, T, hidden] in the dtype of the tables."""
    B, T = ids.shape
    hidden = words.shape[1]
    gamma, beta = gamma.float().contiguous(), beta.float().contiguous()
    tables = [_table(words, ids, B, 0)]
    if types is not None:
        tables.append(_table(types, type_ids, B, 0))
    tables.append(_table(positions, position_ids, B, 1))
    out = words.new_empty(B, T, hidden)
    code = _native.DTYPES[words.dtype]
    rows = (code, B, T, hidden, gamma.data_ptr(), beta.data_ptr(), out.data_ptr())
    threads = _native.threads()
    size = _native.embeddings_scratch(rows, threads)
    scratch = gamma.new_empty(size // 4 + 1)
    _native.embeddings(tables, rows, eps, threads, (scratch.data_ptr(), size))
    return out
