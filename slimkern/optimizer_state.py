"""Carrying an optimizer over to smaller parameters: exchange of tensors, cutting of their state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Steps = list[tuple[int, Tensor]]


def check_owner(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Refuse an optimizer that holds none of a model's parameters.

    Raises:
        ValueError: it trains another model, or this one's parameters were exchanged before.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in parameters):
        raise ValueError(
            "optimizer= holds none of the model's parameters: it would train nothing of it; give "
            "the one that was made from model.parameters() of this model"
        )


def check_state(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Refuse an optimizer whose state can't be cut with its parameters.

    Raises:
        ValueError: a state tensor has dimensions, but not those of its parameter (a factored
            second moment, a low-rank or block-wise quantized state), or lies in a container; or the
            optimizer is dealt out over ranks.
    """
    if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
        raise ValueError(
            "ZeroRedundancyOptimizer: its shares are of the parameters as they are; slim without "
            "optimizer= and make a new one"
        )
    for parameter in parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, (list, tuple, Mapping)) and value:
                raise ValueError(
                    f"optimizer {type(optimizer).__name__}: state {key!r} is a "
                    f"{type(value).__name__}, which can't be cut with its parameter; slim without "
                    f"optimizer= and make a new one"
                )
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                raise ValueError(
                    f"optimizer {type(optimizer).__name__}: state {key!r} of shape "
                    f"{tuple(value.shape)} can't be cut with its parameter of shape "
                    f"{tuple(parameter.shape)}; slim without optimizer= and make a new one"
                )


def move_state(
    optimizer: torch.optim.Optimizer,
    moves: Mapping[nn.Parameter, tuple[nn.Parameter, Steps]],
) -> None:
    """Let an optimizer own the new parameters in place of the old, its state cut alike.

    Args:
        optimizer: checked by :func:`check_state`.
        moves: old parameter -> (new parameter, ``(dim, kept entries)`` cuts in order).
    """
    for group in optimizer.param_groups:
        # In place: some optimizers (LBFGS) keep a reference to the list.
        group["params"][:] = [moves[p][0] if p in moves else p for p in group["params"]]
    for old, (new, steps) in moves.items():
        if old in optimizer.state:
            state = optimizer.state.pop(old)
            optimizer.state[new] = {k: _cut_like(v, old, steps) for k, v in state.items()}


def _cut_like(value: object, old: nn.Parameter, steps: Steps) -> object:
    if not isinstance(value, Tensor) or value.shape != old.shape:
        return value
    for dim, index in steps:
        value = value.index_select(dim, index.to(value.device))
    return value.contiguous()


def innermost(optimizer: Any) -> torch.optim.Optimizer | None:
    """The torch optimizer inside wrappers (such as accelerate's) that hold it as ``optimizer``.

    Raises:
        TypeError: there is none.
    """
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    return optimizer
