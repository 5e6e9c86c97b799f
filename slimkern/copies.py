"""Copies of a model that share its tensors until they are given their own."""

from __future__ import annotations

import copy

import torch
from torch import nn


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of a model that holds the *same* parameters and buffers, so that it costs no memory.

    ``slim_`` and ``repair_`` put new tensors into the copy; the model does not change.
    """
    own = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in own})


@torch.no_grad()
def own_(small: nn.Module, model: nn.Module) -> nn.Module:
    """Give a copy tensors of its own where it still shares those of ``model``; ties stay ties.

    It has no gradients, which were the model's.
    """
    shared = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    fresh: dict[int, torch.Tensor] = {}
    for module in small.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or id(tensor) not in shared:
                    continue
                if id(tensor) not in fresh:
                    fresh[id(tensor)] = copy.deepcopy(tensor)
                tensors[name] = fresh[id(tensor)]  # type: ignore[assignment]
    small.zero_grad(set_to_none=True)
    return small
