"""``embeddings``: the registered op and the function to call."""

from __future__ import annotations

import torch
from torch import Tensor

from slimkern.ops._registry import Backends, define_op
from slimkern.ops._weights import NormWeights

BACKENDS = Backends(__package__, default={"cpu": "cpu", "cuda": "triton"})
_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "reference": (torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
}


def _fake(
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
    return words.new_empty(*ids.shape, words.shape[1])


_op = define_op(
    "embeddings",
    "Tensor ids, Tensor words, Tensor? types, Tensor? type_ids, Tensor positions, "
    "Tensor? position_ids, Tensor gamma, Tensor beta, float eps",
    _fake,
    BACKENDS,
)


def embeddings(
    ids: Tensor,
    words: Tensor,
    positions: Tensor,
    norm: NormWeights,
    *,
    types: Tensor | None = None,
    type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``y = LayerNorm(words[ids] + types[type_ids] + positions[position_ids])``, for inference.

    Args:
        ids: int64 [B, T].
        words: [vocabulary, hidden], float32 or bfloat16, on a GPU also float16.
        positions: [places, hidden].
        norm: a LayerNorm with weight and bias.
        types: [kinds, hidden], or None: nothing is added.
        type_ids: int64 [B or 1, T], or None: every token has row 0.
        position_ids: int64 [B or 1, T], or None: token t has row t.
        backend: ``cpu``, ``triton``, ``reference``, or None for the default.

    Returns:
        [B, T, hidden] in the dtype of the tables, which are summed in float32.

    Raises:
        IndexError: an index is no row of its table; on a GPU, which would have to be waited for,
            the token's row is NaN instead.
        ValueError: a shape or a device does not fit.
        TypeError: a dtype does not fit.
        RuntimeError: a gradient is asked for.
    """
    name = BACKENDS.choose(backend, words.device)
    gamma, beta = norm.weight, norm.bias
    if gamma is None or beta is None or norm.kind != "layer":
        raise ValueError("norm is no LayerNorm with weight and bias; embeddings accept one")
    tables = (("words", words), ("types", types), ("positions", positions))
    for label, table in tables:
        if table is None:
            continue
        if table.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"embeddings have no gradient and {label} requires one: call it under "
                "torch.inference_mode() or torch.no_grad(), or train the model that "
                "slimkern.unfuse_ gives back"
            )
        if table.dtype not in _DTYPES[name] or table.dtype != words.dtype:
            accepted = " or ".join(map(str, _DTYPES[name]))
            raise TypeError(f"{label} has dtype {table.dtype}; accepted: {accepted}, one for all")
        if table.dim() != 2 or table.shape[1] != words.shape[-1] or table.stride(1) != 1:
            raise ValueError(
                f"{label} has shape {tuple(table.shape)} and strides {table.stride()}; accepted: "
                f"[rows, {words.shape[-1]}] of unit last stride"
            )
    for label, vector in (("norm.weight", gamma), ("norm.bias", beta)):
        if vector.shape != words.shape[1:]:
            raise ValueError(
                f"{label} has shape {tuple(vector.shape)}; accepted: [{words.shape[1]}]"
            )
    _check_ids(ids, type_ids, position_ids)
    given = (ids, words, types, type_ids, positions, position_ids, gamma, beta)
    if any(t is not None and t.device != words.device for t in given):
        raise ValueError("the tensors are on several devices; accepted: one for all of them")
    return _op(ids, words, types, type_ids, positions, position_ids, gamma, beta, norm.eps, name)


def _check_ids(ids: Tensor, type_ids: Tensor | None, position_ids: Tensor | None) -> None:
    if ids.dim() != 2:
        raise ValueError(f"ids has shape {tuple(ids.shape)}; accepted: [B, T]")
    B, T = ids.shape
    named = (("ids", ids), ("type_ids", type_ids), ("position_ids", position_ids))
    for label, index in named:
        if index is None:
            continue
        if index.dtype != torch.int64:
            raise TypeError(f"{label} has dtype {index.dtype}; accepted: torch.int64")
        if index.shape not in ((B, T), (1, T)):
            raise ValueError(
                f"{label} has shape {tuple(index.shape)}; accepted: [{B}, {T}] or [1, {T}]"
            )
