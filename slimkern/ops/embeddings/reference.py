"""The equation in plain torch: the oracle of the kernel.

    y[b, t] = norm(words[ids[b, t]] + types[type_ids[b, t]] + positions[position_ids[b, t]])

Without ``type_ids`` every token has row 0, without ``position_ids`` token t has row t.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    total = words[ids]
    if types is not None:
        total = total + (types[0] if type_ids is None else types[type_ids])
    places = torch.arange(ids.shape[1], device=ids.device) if position_ids is None else position_ids
    total = total + positions[places]
    return torch.layer_norm(total, (total.shape[-1],), gamma, beta, eps)
